"""memory: what weights, gradients and optimiser take, against what the machine has.

Learner and engine take turns on a GPU; on a CPU they are in memory together. P parameters: the learner holds
float32 weights, gradients and AdamW's two moments, 16 bytes each; the reference float32 weights, 4 bytes.
With update.lora the weights alone: they have no gradient, and with the adapter off are the reference too.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.artifacts import ActiveRun
from grpo.errors import ResourceError
from grpo.generate.engines.choice import choose_engine
from grpo.manage.doctor.check import Check, failed, gib
from grpo.manage.doctor.checkpoint import Checkpoint

LEARNER_BYTES = 16
RELEASED_BYTES = 12  # the learner in main memory while the engine has the GPU: no gradients then
FLOAT32_BYTES = 4
LEFT_OUT = (
    "left out: activations, the built-in engine's key-value cache, an adapter, the libraries themselves"
)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Estimate:
    """Bytes of what is held at the same time or in turns."""

    learner: int
    reference: int
    waiting: int
    """Learner and reference in main memory, while the engine has the GPU."""
    engine: int
    """Weights of the engine, and on a CPU vLLM's cache."""


def check_memory(run: ActiveRun, policy: Checkpoint, reference: Checkpoint) -> list[Check]:
    """GPU and main memory, or main memory alone; nothing where a size is not known."""
    import torch

    update = run.config.update
    shares_base = update.lora is not None and update.reference is None
    with_reference = bool(update.kl_coefficient) and not shares_base
    if policy.parameters is None or (with_reference and reference.parameters is None):
        return []
    on_gpu = torch.cuda.is_available()
    num_reference = reference.parameters or 0 if with_reference else 0
    settings = _engine_settings(run)
    estimate = Estimate(
        learner=(FLOAT32_BYTES if update.lora else LEARNER_BYTES) * policy.parameters,
        reference=FLOAT32_BYTES * num_reference,
        waiting=(FLOAT32_BYTES if update.lora else RELEASED_BYTES) * policy.parameters
        + FLOAT32_BYTES * num_reference,
        engine=_engine_bytes(policy.parameters, settings, on_gpu),
    )
    if not on_gpu:
        return [_check_main(estimate.learner + estimate.reference + estimate.engine, _parts(estimate))]
    free, total = torch.cuda.mem_get_info()
    share = settings.get("gpu_memory_utilization", 1.0)
    gpu = judge_gpu(torch.cuda.get_device_name(), free, total, share, estimate)
    return [gpu, _check_main(estimate.waiting, "learner and reference while the engine has the GPU")]


def judge_gpu(name: str, free: int, total: int, share: float, estimate: Estimate) -> Check:
    """share: of the GPU that the engine may take."""
    training = estimate.learner + estimate.reference
    most = max(training, estimate.engine)
    found = f"{name}: {gib(free)} of {gib(total)} free"
    needed = f"{gib(most)}: {_parts(estimate)}, in turns"
    if training > total:
        text = (
            f"GPU memory: {gib(training)} to train, {gib(total)} there; use a smaller model or a larger GPU"
        )
        return failed("GPU memory", found, needed, ResourceError(text))
    if estimate.engine > share * total:
        text = (
            f"GPU memory: {gib(estimate.engine)} of engine weights, {gib(share * total)} for them; raise"
            " gpu_memory_utilization or tensor_parallel_size in generate.engine_options"
        )
        return failed("GPU memory", found, needed, ResourceError(text))
    taken = max(most, share * total if share < 1 else 0)
    if taken > free:
        note = f"{gib(taken)} will be asked for and other processes hold {gib(total - free)}; end them first"
        return Check("GPU memory", found, needed, "warning", note)
    return Check("GPU memory", found, needed, note=LEFT_OUT)


def _check_main(need: int, parts: str) -> Check:
    total, available = main_memory()
    found, needed = f"{gib(available)} of {gib(total)} available", f"{gib(need)}: {parts}"
    if need > total:
        text = f"memory: {gib(need)} needed, {gib(total)} there; use a smaller model or a larger machine"
        return failed("memory", found, needed, ResourceError(text))
    if need > available:
        note = f"other processes hold {gib(total - available)}; end some of them first"
        return Check("memory", found, needed, "warning", note)
    return Check("memory", found, needed, note=LEFT_OUT)


def main_memory() -> tuple[int, int]:
    """Bytes of main memory this process may have: in all, and without taking from others."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, available = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):  # with caches, which the kernel gives up
            available = 1024 * int(line.split()[1])
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max":
        total = min(total, int(limit))
    return total, min(available, total)


def _parts(estimate: Estimate) -> str:
    texts = [f"learner {gib(estimate.learner)}"]
    if estimate.reference:
        texts.append(f"reference {gib(estimate.reference)}")
    return ", ".join([*texts, f"engine {gib(estimate.engine)}"])


def _engine_settings(run: ActiveRun) -> dict[str, Any]:
    """vLLM's arguments as they will be; empty for the built-in engine, and where there is no vLLM to ask."""
    config = run.config.generate
    if choose_engine(config.engine)[0] != "vllm":
        return {}
    from grpo.generate.engines.vllm_settings import defaults

    return {**defaults(max_model_len=1), **config.engine_options}


def _engine_bytes(parameters: int, settings: dict[str, Any], on_gpu: bool) -> int:
    if not settings:  # the built-in engine
        return FLOAT32_BYTES * parameters
    from grpo.generate.engines.vllm_settings import CPU_CACHE_GIB

    width = FLOAT32_BYTES if settings.get("dtype") in ("float32", "float") else FLOAT32_BYTES // 2
    weights = width * parameters // int(settings.get("tensor_parallel_size", 1))
    cache = 0 if on_gpu else int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * 2**30
    return weights + cache
