"""peak: what a run takes at its peak, by what it is for, from configurations alone.

Learner, engine and what scores take turns on a GPU; on a CPU what they hold stays.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from grpo.config import Config
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.vllm_settings import CPU_CACHE_GIB, bytes_per_number, cache_bytes, defaults
from grpo.models.size import Shape
from grpo.update.memory import FLOAT32, Needs, longest_batch, needs
from grpo.update.plan import resolved

LIBRARIES = int(0.6 * 2**30)  # torch, transformers, DuckDB and Arrow once they have worked
_DRAWN = 24  # bytes of a logit as a token is drawn: itself, scaled, log-softmax, its exponential, cumulative


@dataclass(frozen=True)
class Facts:
    """What is known beside the configuration. scorers: parameters of reward models and teachers held here."""

    shape: Shape
    parameters: int
    reference: int
    scorers: int
    longest_prompt: int
    on_gpu: bool
    total: int = 0  # of the GPU
    elsewhere: int = 0  # parameters of reward models in each process of execution.scorers


@dataclass(frozen=True)
class Peak:
    """Bytes by what they are for: what is held all the time, and what comes and goes in turns."""

    held: dict[str, int] = field(default_factory=dict)
    turns: tuple[dict[str, int], ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """Of the moment at which most is taken."""
        largest = max(self.turns, key=lambda turn: sum(turn.values()), default={})
        return {name: size for name, size in (self.held | largest).items() if size}

    @property
    def total(self) -> int:
        """Of that moment."""
        return sum(self.parts.values())


def peak_of(config: Config, facts: Facts) -> Peak:
    """What `config` takes at its peak, on the GPU where one is, else in main memory."""
    learner, engine = _update(config, facts), _engine(config, facts)
    scorers = {"reward models and teachers": FLOAT32 * facts.scorers} | _scorers(config, facts)
    if facts.on_gpu:
        return Peak({}, (learner.held | learner.batch, engine, scorers))
    held = {"libraries": LIBRARIES * _processes(config, facts)[2]} | learner.held | scorers
    engines = None if config.execution is None else config.execution.engines
    if config.execution is not None and engines is not None:  # of this machine they all are, else elsewhere
        count = engines.count if config.execution.backend == "local" else 0
        each = sum(engine.values()) + LIBRARIES + FLOAT32 * facts.parameters * (engine["engine"] == 0)
        return Peak(held | {"engines": count * each}, (learner.batch,))
    if choose_engine(config.generate.engine)[0] == "vllm":
        return Peak(held | engine, (learner.batch,))  # it stays open
    return Peak(held, (learner.batch, engine))


def _scorers(config: Config, facts: Facts) -> dict[str, int]:
    """Processes of this machine that hold reward models, each all of them."""
    execution = config.execution
    if execution is None or execution.scorers is None or execution.backend == "ray" or not facts.elsewhere:
        return {}
    return {"scorers": execution.scorers.count * (LIBRARIES + FLOAT32 * facts.elsewhere)}


def waiting(config: Config, facts: Facts) -> int:
    """Main memory of what leaves the GPU to others; gradients do not."""
    held = _update(as_opened(config, facts, facts.total), facts).held
    return sum(held.values()) - held["gradients"] + FLOAT32 * facts.scorers + LIBRARIES


def as_opened(config: Config, facts: Facts, free: int) -> Config:
    """As the learner will open: auto checkpoints gradients where what is free is too little without."""
    for checkpointing in (False, True):
        update = resolved(config.update, on_gpu=facts.on_gpu, checkpointing=checkpointing)
        found = config.model_copy(update={"update": update})
        if config.update.gradient_checkpointing != "auto" or _update(found, facts).total <= free:
            break
    return found


def tokens_at_most(config: Config, facts: Facts) -> int:
    """Of a micro-batch."""
    return longest_batch(config, facts.longest_prompt, on_gpu=facts.on_gpu)


def _update(config: Config, facts: Facts) -> Needs:
    """Of all processes of the learner that are in the memory that is looked at."""
    tokens, processes = tokens_at_most(config, facts), _processes(config, facts)
    whole = needs(
        facts.shape,
        facts.parameters,
        config.update,
        tokens,
        facts.reference,
        on_gpu=facts.on_gpu,
        is_shared=processes[0] > 1,
    )
    return whole.beside(*processes)


def _processes(config: Config, facts: Facts) -> tuple[int, int, int]:
    """Of the learner: all; replicas of its weights; those in the memory that is looked at. A GPU is each
    one's own."""
    if config.execution is None:
        return 1, 1, 1
    world = config.execution.processes
    beside = 1 if facts.on_gpu or config.execution.backend == "ray" else world
    return world, config.execution.replicas, beside


def _engine(config: Config, facts: Facts) -> dict[str, int]:
    """Weights, keys and values: of vLLM what it reserves, of the built-in engine what a batch can need."""
    generate, shape = config.generate, facts.shape
    each = 2 * shape.layers * shape.keys  # numbers of a token
    if choose_engine(generate.engine)[0] == "vllm":
        return vllm_parts(config, facts)
    samples = generate.samples_per_prompt
    rows = max(samples, min(generate.max_rows_per_batch, generate.prompts_per_iteration * samples))
    tokens = rows * generate.max_new_tokens + -(-rows // samples) * facts.longest_prompt
    cache = FLOAT32 * each * tokens
    # It computes with the learner's own weights, where those stay and no adapter is to be merged.
    shares = not facts.on_gpu and config.update.lora is None
    return {
        "engine": 0 if shares else FLOAT32 * facts.parameters,
        "key-value cache": cache + cache // shape.layers,  # a layer's is copied as it grows
        "logits": _DRAWN * rows * shape.vocabulary,
    }


def vllm_parts(config: Config, facts: Facts) -> dict[str, int]:
    """Bytes of what vLLM holds."""
    options = vllm_options(config, facts)
    weights = bytes_per_number(options) * facts.parameters // int(options.get("tensor_parallel_size", 1))
    if not facts.on_gpu:
        return {"engine": weights, "key-value cache": _cpu_cache()}
    given = config.generate.engine_options
    cache = cache_bytes(given, options, facts.shape, facts.parameters, facts.total)
    if cache is None:
        cache = max(int(vllm_share(options) * facts.total) - weights, 0)
    return {"engine": weights, "key-value cache": cache}


def vllm_options(config: Config, facts: Facts) -> dict[str, Any]:
    """Its engine arguments, the user's among them."""
    length = facts.longest_prompt + config.generate.max_new_tokens
    return {**defaults(length), **config.generate.engine_options}


def vllm_share(options: dict[str, Any]) -> float:
    """Of the GPU, that vLLM takes."""
    return float(options.get("gpu_memory_utilization", 1.0))


def _cpu_cache() -> int:
    return int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * 2**30
