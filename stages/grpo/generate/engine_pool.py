"""engine_pool: the engines that sample in other processes, as `execution` has them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.errors import UsageError
from grpo.execute import Checkpoint, Pool, backend_of
from grpo.generate.engines.protocol import Engine
from grpo.generate.worker import EngineSettings, opener
from grpo.models.loading import load_config
from grpo.models.weight_check import read_weight_check

if TYPE_CHECKING:
    from grpo.generate.vllm_transfer import Sender

TRANSFER = "nccl"  # of vLLM's ways to transfer weights


@dataclass
class Engines:
    """sender: gives them a policy that is in this process's memory; None: they read it as files."""

    pool: Pool
    sender: "Sender | None" = None

    def close(self) -> None:
        """End all of them."""
        if self.sender is not None:
            self.sender.leave()
        self.pool.close()


def open_engines(run: ActiveRun, making: Callable[..., Engine], engine: str, device: str) -> Engines | None:
    """Those of the configuration, none of which is started yet; None: this process samples.

    making: makes one, `engine` by name, which takes weights by `transfer`. Raises UsageError (exit 2) where
    they would compute otherwise than the configuration says, and as backend_of().
    """
    check_engines(run.config, engine, device)
    execution = run.config.execution
    if execution is None or execution.engines is None:
        return None
    engines = execution.engines
    start, threads = run.start["policy"], torch.get_num_threads()
    in_memory = execution.weights == "memory"
    settings = EngineSettings(
        partial(making, transfer=TRANSFER) if in_memory else making,
        Checkpoint.of(start),
        read_weight_check(run.weight_check_path(0)),
        load_config(start).get_text_config().vocab_size,
        run.config.model_options.attn_implementation,
        threads,
    )
    backend = backend_of(execution, opener(settings), threads, engines.gpus)
    # What vLLM samples depends on what else it has at hand: of two copies of a shard, either would be right,
    # but not the same.
    pool = Pool(backend, engines.count, copies=engine != "vllm", timeout_s=engines.timeout_s)
    if not in_memory:
        return Engines(pool)
    from grpo.generate.vllm_transfer import Sender

    return Engines(pool, Sender(pool, engines.gpus))


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
    if config.execution.weights == "memory" and not (gpus and device != "cpu"):
        raise UsageError(
            "execution.weights: memory: goes from this process's GPU to those of engines (`engines.gpus`), by"
            " NCCL; `weights: disk` is right without, and stays in memory where all is one machine"
        )
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
