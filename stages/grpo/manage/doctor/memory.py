"""memory: what a run takes at its peak, against what is there, and which key makes it less.

From configurations alone. Learner, engine and what scores take turns on a GPU; on a CPU what they hold stays.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.errors import ResourceError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.vllm_settings import (
    CPU_CACHE_GIB,
    bytes_per_number,
    bytes_per_token,
    cache_bytes,
    defaults,
)
from grpo.manage.doctor.inputs import Checkpoint
from grpo.manage.doctor.report import Check, Report
from grpo.manage.doctor.space import gib
from grpo.models.device import main_memory
from grpo.models.loading import load_config
from grpo.models.size import Shape, shape_of
from grpo.score.scorers import models_here
from grpo.update.gradient_checkpointing import has_reference
from grpo.update.memory import FLOAT32, Needs, longest_batch, needs
from grpo.update.plan import resolved

LIBRARIES = int(0.6 * 2**30)  # torch, transformers, DuckDB and Arrow once they have worked
_DRAWN = 24  # bytes of a logit as a token is drawn: itself, scaled, log-softmax, its exponential, cumulative
_SHOWN = 0.01  # of the whole, at least
_LEAST = {"update.max_tokens_per_batch": 256, "generate.max_rows_per_batch": 8}  # what is proposed is no less


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


def check_memory(
    run: ActiveRun, report: Report, policy: Checkpoint, reference: Checkpoint, longest_prompt: int
) -> None:
    """GPU and main memory, or main memory alone; nothing where a size is not known."""
    with_reference = has_reference(run.config.update)
    if policy.folder is None or policy.parameters is None:
        return
    shape = shape_of(load_config(policy.folder))
    if shape is None or (with_reference and reference.parameters is None):
        return
    scorers = [
        sum(size for name, size in report.parameters.items() if name.startswith(kind))
        for kind in ("reward ", "teacher ")
    ]
    elsewhere = 0 if models_here(run.config) else scorers[0]
    on_gpu, referred = torch.cuda.is_available(), (reference.parameters or 0) * with_reference
    facts = Facts(shape, policy.parameters, referred, sum(scorers) - elsewhere, longest_prompt, on_gpu)
    if not on_gpu:
        _check(report, "memory", "machine", run.config, replace(facts, elsewhere=elsewhere), *main_memory())
        return
    total, free = reversed(torch.cuda.mem_get_info())
    facts = replace(facts, total=total)
    check_gpu(report, torch.cuda.get_device_name(), run.config, facts, free)
    waiting = _waiting(run.config, facts)
    there, available = main_memory()
    found, needed = f"{gib(available)} of {gib(there)} available", f"{gib(waiting)}: what waits for the GPU"
    with report.check("memory", found, needed) as check:
        _fit(check, waiting, there, available, "a smaller model or a larger machine")


def check_gpu(report: Report, name: str, config: Config, facts: Facts, free: int) -> None:
    """The GPU `name`, of which `free` bytes are: for learner, engine and what scores, in turns."""
    _check(report, "GPU memory", name, config, facts, facts.total, free)
    if choose_engine(config.generate.engine)[0] == "vllm" and report.checks[-1].level != "failed":
        with report.check("engine cache", "", "room for the engine's weights and its sequences") as check:
            _check_cache(check, config, facts)


def _check(report: Report, what: str, name: str, config: Config, facts: Facts, total: int, free: int) -> None:
    config, tokens = _resolved(config, facts, free), _tokens(config, facts)
    peak = peak_of(config, facts)
    found = f"{gib(free)} of {gib(total)} available"
    large = {part: size for part, size in peak.parts.items() if size >= _SHOWN * peak.total}
    parts = ", ".join(f"{part} {gib(size)}" for part, size in large.items())
    with report.check(what, found if what == "memory" else f"{name}: {found}", "") as check:
        again = ", computed again backwards" if config.update.gradient_checkpointing else ""
        check.needed = f"{gib(peak.total)}: {parts}; micro-batches of {tokens:,} tokens{again}"
        if not facts.longest_prompt:
            check.note = "left out: prompts, which are not known yet"
        way = way_out(config, facts, min(free, total)) if peak.total > min(free, total) else ""
        _fit(check, peak.total, total, free, way)


def _fit(check: Check, need: int, total: int, free: int, way: str) -> None:
    """Raise ResourceError where `need` bytes are not there at all; warn where others hold them."""
    if need > total:
        raise ResourceError(f"{check.name}: {gib(need)} needed, {gib(total)} there; {way}")
    if need > free:
        others = f"other processes hold {gib(total - free)}"
        check.warn(f"{gib(need)} will be asked for and {others}; end some of them first, or {way}")


def _resolved(config: Config, facts: Facts, free: int) -> Config:
    """As the learner will open: auto checkpoints gradients where what is free is too little without."""
    for checkpointing in (False, True):
        update = resolved(config.update, on_gpu=facts.on_gpu, checkpointing=checkpointing)
        found = config.model_copy(update={"update": update})
        if config.update.gradient_checkpointing != "auto" or _update(found, facts).total <= free:
            break
    return found


def _tokens(config: Config, facts: Facts) -> int:
    return longest_batch(config, facts.longest_prompt, on_gpu=facts.on_gpu)


def _update(config: Config, facts: Facts) -> Needs:
    """Of all processes of the learner that are in the memory that is looked at."""
    tokens, update = _tokens(config, facts), config.update
    whole = needs(facts.shape, facts.parameters, update, tokens, facts.reference, on_gpu=facts.on_gpu)
    return whole.beside(*_processes(config, facts))


def _processes(config: Config, facts: Facts) -> tuple[int, int]:
    """Of the learner those that share out its weights; and all in the memory that is looked at: a GPU is
    each one's own."""
    if config.execution is None:
        return 1, 1
    world = config.execution.processes
    return (
        world // config.execution.replicas,
        1 if facts.on_gpu or config.execution.backend == "ray" else world,
    )


def peak_of(config: Config, facts: Facts) -> Peak:
    """What `config` takes at its peak, on the GPU where one is, else in main memory."""
    learner, engine = _update(config, facts), _engine(config, facts)
    scorers = {"reward models and teachers": FLOAT32 * facts.scorers} | _scorers(config, facts)
    if facts.on_gpu:
        return Peak({}, (learner.held | learner.batch, engine, scorers))
    held = {"libraries": LIBRARIES * _processes(config, facts)[1]} | learner.held | scorers
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


def _waiting(config: Config, facts: Facts) -> int:
    """Main memory of what leaves the GPU to others; gradients do not."""
    held = _update(_resolved(config, facts, facts.total), facts).held
    return sum(held.values()) - held["gradients"] + FLOAT32 * facts.scorers + LIBRARIES


def _engine(config: Config, facts: Facts) -> dict[str, int]:
    """Weights, keys and values: of vLLM what it reserves, of the built-in engine what a batch can need."""
    generate, shape = config.generate, facts.shape
    each = 2 * shape.layers * shape.keys  # numbers of a token
    if choose_engine(generate.engine)[0] == "vllm":
        return _vllm(config, facts)
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


def _vllm(config: Config, facts: Facts) -> dict[str, int]:
    options = _options(config, facts)
    weights = bytes_per_number(options) * facts.parameters // int(options.get("tensor_parallel_size", 1))
    if not facts.on_gpu:
        return {"engine": weights, "key-value cache": _cpu_cache()}
    given = config.generate.engine_options
    cache = cache_bytes(given, options, facts.shape, facts.parameters, facts.total)
    if cache is None:
        cache = max(int(_share(options) * facts.total) - weights, 0)
    return {"engine": weights, "key-value cache": cache}


def _options(config: Config, facts: Facts) -> dict[str, Any]:
    length = facts.longest_prompt + config.generate.max_new_tokens
    return {**defaults(length), **config.generate.engine_options}


def _share(options: dict[str, Any]) -> float:
    """Of the GPU, that vLLM takes."""
    return float(options.get("gpu_memory_utilization", 1.0))


def _cpu_cache() -> int:
    return int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * 2**30


def _check_cache(check: Check, config: Config, facts: Facts) -> None:
    """Whether vLLM's share of the GPU holds its weights, and how many sequences beside them."""
    found, options = _vllm(config, facts), _options(config, facts)
    length = facts.longest_prompt + config.generate.max_new_tokens
    sequence = bytes_per_token(facts.shape, options) * length
    fitting = found["key-value cache"] // sequence
    asked = min(
        int(options.get("max_num_seqs", 2**31)),
        config.generate.prompts_per_iteration * config.generate.samples_per_prompt,
    )
    check.found = f"{gib(found['engine'])} of weights, {fitting:,} sequences of {length:,} tokens beside them"
    if not fitting:
        raise ResourceError(
            f"GPU memory: {gib(found['engine'])} of engine weights and {gib(sequence)} of a sequence,"
            f" {gib(_share(options) * facts.total)} for them; raise gpu_memory_utilization or"
            " tensor_parallel_size in generate.engine_options"
        )
    if fitting < asked:
        check.note = (
            f"{asked:,} are asked for at once, and {fitting:,} at their longest fit: the others wait, or"
            f" are restarted; generate.engine_options: {{max_num_seqs: {fitting}}} avoids that"
        )


def way_out(config: Config, facts: Facts, there: int) -> str:
    """The keys that make it fit into `there` bytes, each no further than it has to; else what else may."""
    changes: dict[str, Any] = {}
    while (taken := peak_of(config, facts).total) > there:
        smaller = ((key, less) for key, less in _smaller(config) if peak_of(less, facts).total < taken)
        if (found := next(smaller, None)) is None:
            break
        key, config = found
        changes[key] = changed_value(config, key)
    else:
        given = " and ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
        return f"set {given}, which takes {gib(taken)}"
    if choose_engine(config.generate.engine)[0] == "vllm" and sum(_vllm(config, facts).values()) > there:
        key = "generate.engine_options.gpu_memory_utilization" if facts.on_gpu else "VLLM_CPU_KVCACHE_SPACE"
        return f"lower {key}"
    return "use update.lora, a smaller model, or a machine with more"


def changed_value(config: Config, key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """The key that is another one, and the configuration in which it is: a step towards less memory each."""
    if not config.update.gradient_checkpointing:
        yield "update.gradient_checkpointing", _with(config, "update.gradient_checkpointing", True)
    for key, least in _LEAST.items():
        if (value := changed_value(config, key) // 2) >= least:
            yield key, _with(config, key, value)


def _with(config: Config, key: str, value: Any) -> Config:
    section, _, name = key.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
