"""memory: what a run takes at its peak, against what is there, and which key makes it less."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.errors import ResourceError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.vllm_settings import bytes_per_token
from grpo.manage.doctor.inputs import Checkpoint
from grpo.manage.doctor.peak import (
    Facts,
    as_opened,
    peak_of,
    tokens_at_most,
    vllm_options,
    vllm_parts,
    vllm_share,
    waiting,
)
from grpo.manage.doctor.report import Check, Report
from grpo.manage.doctor.space import gib
from grpo.models.device import main_memory
from grpo.models.loading import load_config
from grpo.models.size import shape_of
from grpo.score.scorers import models_here
from grpo.update.gradient_checkpointing import has_reference

_SHOWN = 0.01  # of the whole, at least
_LEAST = {"update.max_tokens_per_batch": 256, "generate.max_rows_per_batch": 8}  # what is proposed is no less


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
    parked = waiting(run.config, facts)
    there, available = main_memory()
    found, needed = f"{gib(available)} of {gib(there)} available", f"{gib(parked)}: what waits for the GPU"
    with report.check("memory", found, needed) as check:
        _fit(check, parked, there, available, "a smaller model or a larger machine")


def check_gpu(report: Report, name: str, config: Config, facts: Facts, free: int) -> None:
    """The GPU `name`, of which `free` bytes are: for learner, engine and what scores, in turns."""
    _check(report, "GPU memory", name, config, facts, facts.total, free)
    if choose_engine(config.generate.engine)[0] == "vllm" and report.checks[-1].level != "failed":
        with report.check("engine cache", "", "room for the engine's weights and its sequences") as check:
            _check_cache(check, config, facts)


def _check(report: Report, what: str, name: str, config: Config, facts: Facts, total: int, free: int) -> None:
    config, tokens = as_opened(config, facts, free), tokens_at_most(config, facts)
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


def _check_cache(check: Check, config: Config, facts: Facts) -> None:
    """Whether vLLM's share of the GPU holds its weights, and how many sequences beside them."""
    found, options = vllm_parts(config, facts), vllm_options(config, facts)
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
            f" {gib(vllm_share(options) * facts.total)} for them; raise gpu_memory_utilization or"
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
    if choose_engine(config.generate.engine)[0] == "vllm" and sum(vllm_parts(config, facts).values()) > there:
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
