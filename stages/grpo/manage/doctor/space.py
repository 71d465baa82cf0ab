"""space: what training and its checkpoints take, against the memory and the disk that are there.

Learner and engine take turns on a GPU; on a CPU they are in memory together.
"""

import os
import shutil
from pathlib import Path

import torch

from grpo.artifacts import ActiveRun
from grpo.errors import ResourceError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.vllm_settings import CPU_CACHE_GIB, defaults
from grpo.manage.doctor.inputs import Checkpoint
from grpo.manage.doctor.report import Check, Report

# Of a parameter, in bytes.
FLOAT32 = 4
MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # two, in the learner and beside the weights of a checkpoint
LEFT_OUT = "left out: activations, the built-in engine's key-value cache, an adapter, the libraries"


def check_memory(run: ActiveRun, report: Report, policy: Checkpoint, reference: Checkpoint) -> None:
    """GPU and main memory, or main memory alone; nothing where a size is not known."""
    update = run.config.update
    # Under an adapter the weights have no gradient, and with it off they are the reference too.
    alone = update.lora is not None and not update.lora.modules_to_save
    shares_base = alone and update.reference is None and update.reference_every is None
    with_reference = bool(update.kl_coefficient) and not shares_base
    if policy.parameters is None or (with_reference and reference.parameters is None):
        return
    on_gpu = torch.cuda.is_available()
    moments = 0 if update.lora else MOMENTS[update.optimizer]
    gradients = 0 if update.lora else FLOAT32
    engine, share = _engine_bytes(run, policy.parameters, on_gpu)
    held = {
        "learner": (FLOAT32 + gradients + moments) * policy.parameters,
        "reference": FLOAT32 * (reference.parameters or 0) if with_reference else 0,
        "engine": engine,
    }
    if not on_gpu:
        _check_main(report, sum(held.values()), _parts(held))
        return
    check_gpu(report, torch.cuda.get_device_name(), *torch.cuda.mem_get_info(), share, held)
    waiting = (FLOAT32 + moments) * policy.parameters + held["reference"]  # no gradients then
    _check_main(report, waiting, "learner and reference while the engine has the GPU")


def check_gpu(report: Report, name: str, free: int, total: int, share: float, held: dict[str, int]) -> None:
    """share: of the GPU that the engine may take; held: bytes of learner, reference and engine."""
    training, engine = held["learner"] + held["reference"], held["engine"]
    most = max(training, engine)
    found = f"{name}: {_gib(free)} of {_gib(total)} free"
    with report.check("GPU memory", found, f"{_gib(most)}: {_parts(held)}, in turns") as check:
        _fit(check, "GPU", training, max(most, share * total if share < 1 else 0), free, total)
        if engine > share * total:
            raise ResourceError(
                f"GPU memory: {_gib(engine)} of engine weights, {_gib(share * total)} for them; raise"
                " gpu_memory_utilization or tensor_parallel_size in generate.engine_options"
            )


def _main_memory() -> tuple[int, int]:
    """Bytes of main memory: what there is for this process, and what of it nobody holds."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):  # with caches, which the kernel gives up
            free = 1024 * int(line.split()[1])
    if cgroup.exists() and (limit := cgroup.read_text().strip()) != "max":
        total = min(total, int(limit))
    return total, min(free, total)


def _check_main(report: Report, need: int, parts: str) -> None:
    total, free = _main_memory()
    found = f"{_gib(free)} of {_gib(total)} available"
    with report.check("memory", found, f"{_gib(need)}: {parts}") as check:
        _fit(check, "machine", need, need, free, total)


def _fit(check: Check, where: str, need: int, taken: float, free: int, total: int) -> None:
    """Raise ResourceError where `need` bytes are not there at all; warn where others hold what is taken."""
    if need > total:
        text = f"{_gib(need)} needed, {_gib(total)} there; use a smaller model or a larger {where}"
        raise ResourceError(f"{check.name}: {text}")
    check.note = LEFT_OUT
    if taken > free:
        others = f"other processes hold {_gib(total - free)}; end some of them first"
        check.warn(f"{_gib(taken)} will be asked for and {others}")


def _engine_bytes(run: ActiveRun, parameters: int, on_gpu: bool) -> tuple[int, float]:
    """What the engine's weights take, on a CPU with vLLM's cache; and the share of a GPU that it may have."""
    config = run.config.generate
    if choose_engine(config.engine)[0] != "vllm":
        return FLOAT32 * parameters, 1.0
    settings = {**defaults(max_model_len=1), **config.engine_options}
    width = FLOAT32 if settings.get("dtype") in ("float32", "float") else FLOAT32 // 2
    weights = width * parameters // int(settings.get("tensor_parallel_size", 1))
    cache = 0 if on_gpu else int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * 2**30
    return weights + cache, settings.get("gpu_memory_utilization", 1.0)


def check_disk(run: ActiveRun, report: Report, policy: Checkpoint) -> None:
    """Free space against the checkpoints still to come; nothing where the model's size is not known."""
    if policy.parameters is None:
        return
    above = (path for path in run.root.absolute().parents if path.exists())
    place = run.root if run.root.exists() else next(above)  # where a run would make it
    free = shutil.disk_usage(place).free
    done = sum(run.manifest("update", iteration) is not None for iteration in run.iterations())
    stay = left = max(0, run.config.iterations - done)
    config = run.config.checkpoints
    if config.keep_last is not None:
        # One more than is kept: the oldest goes when the newest is committed.
        best = run.config.evaluate is not None and config.keep_best
        nth = left // config.keep_every if config.keep_every else 0
        references = (
            nth + 1 + best if run.config.update.reference_every else 0
        )  # of the newest, every nth, the best
        stay = min(left, config.keep_last + 1 + best + nth + references)
    # The moments of an adapter are left out: they are a small part of the weights.
    moments = 0 if run.config.update.lora else MOMENTS[run.config.update.optimizer]
    each = (FLOAT32 + moments) * policy.parameters
    need, found = stay * each, f"{_gib(free)} free at {place}"
    with report.check("disk space", found, f"{_gib(need)}: {left} iterations to come") as check:
        if need > free:
            text = f"{_gib(free)} free, {_gib(need)} needed, since checkpoints of {_gib(each)} each stay"
            raise ResourceError(f"{place}: {text}; free some, or lower iterations")
        check.note = "left out: the tables, about 4 bytes per token"


def _gib(num_bytes: float) -> str:
    """A size for a person: `7.4 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.0f} MiB"


def _parts(held: dict[str, int]) -> str:
    return ", ".join(f"{what} {_gib(size)}" for what, size in held.items() if size)
