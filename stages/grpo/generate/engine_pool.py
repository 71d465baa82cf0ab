"""engine_pool: the engines that sample in other processes, as `execution` has them."""

from collections.abc import Callable

import torch

from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.errors import UsageError
from grpo.execute import Checkpoint, Pool, backend_of
from grpo.generate.engines.protocol import Engine
from grpo.generate.worker import EngineSettings, opener
from grpo.models.loading import load_config
from grpo.models.weight_check import read_weight_check


def open_pool(run: ActiveRun, making: Callable[[], Engine], engine: str, device: str) -> Pool | None:
    """A pool of them, none of which is started yet; None: this process samples.

    making: an engine, `engine` by name. Raises UsageError (exit 2) where they would compute otherwise than
    the configuration says, and as backend_of().
    """
    check_engines(run.config, engine, device)
    execution = run.config.execution
    if execution is None or execution.engines is None:
        return None
    engines = execution.engines
    start, threads = run.start["policy"], torch.get_num_threads()
    settings = EngineSettings(
        making,
        Checkpoint.of(start),
        read_weight_check(run.weight_check_path(0)),
        load_config(start).get_text_config().vocab_size,
        run.config.model_options.attn_implementation,
        threads,
    )
    backend = backend_of(execution, opener(settings), threads, engines.gpus)
    # What vLLM samples depends on what else it has at hand: of two copies of a shard, either would be right,
    # but not the same.
    return Pool(backend, engines.count, copies=engine != "vllm", timeout_s=engines.timeout_s)


def check_engines(config: Config, engine: str, device: str) -> None:
    """Raise UsageError (exit 2) for `execution` with which engines would not compute what is configured."""
    if config.execution is None:
        return
    if config.execution.engines is None:
        if engine == "vllm" and config.execution.processes > 1:
            raise UsageError(
                "generate.engine: vllm: has a process group of its own, beside which this process cannot"
                " train with others; `execution.engines: {}` gives it a process of its own, or set engine:"
                " transformers"
            )
        return
    options, gpus = config.generate.engine_options, config.execution.engines.gpus
    if not gpus:
        if device != "cpu":
            raise UsageError(
                "execution.engines.gpus: 0, but this machine computes on a GPU, and engines would on a CPU;"
                " `engines: null` samples in this process, or give each engine a GPU of a Ray cluster"
            )
        return
    if engine != "vllm" or "dtype" not in options:  # this machine may have no GPU to choose by
        raise UsageError(
            f"execution.engines.gpus: {gpus}, which needs generate.engine: vllm and a dtype in"
            " generate.engine_options"
        )
    used = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    if used != gpus:
        raise UsageError(
            f"execution.engines.gpus: {gpus}, but generate.engine_options make an engine use {used};"
            f" {used} is right"
        )
