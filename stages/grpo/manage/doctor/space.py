"""space: what the checkpoints of a run take, against the disk that is there."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from grpo.artifacts import ActiveRun, files
from grpo.config import UpdateConfig
from grpo.console import duration
from grpo.errors import ResourceError
from grpo.manage.doctor.inputs import Checkpoint
from grpo.manage.doctor.report import Report
from grpo.models.loading import load_config
from grpo.models.size import shape_of
from grpo.update.durable import LONGEST_S, SHARE
from grpo.update.memory import FLOAT32, MOMENTS, adapter_parameters

_TRIED_BYTES = 2**24  # of the disk, to see how fast it is


def check_disk(run: ActiveRun, report: Report, policy: Checkpoint) -> None:
    """Free space against the checkpoints still to come; nothing where the model's size is not known."""
    if policy.parameters is None:
        return
    above = (path for path in run.root.absolute().parents if path.exists())
    place = run.root if run.root.exists() else next(above)  # where a run would make it
    free = shutil.disk_usage(place).free
    done = sum(run.manifest("update", iteration) is not None for iteration in run.iterations())
    stay = left = max(0, run.config.iterations - done)
    config, every = run.config.checkpoints, run.config.checkpoints.every
    if isinstance(every, int):
        stay = -(-left // every)
    if config.keep_last is not None:
        # One more than is kept: the oldest goes when the newest is committed.
        best = run.config.evaluate is not None and config.keep_best
        nth = left // config.keep_every if config.keep_every else 0
        references = (
            nth + 1 + best if run.config.update.reference_every else 0
        )  # of the newest, every nth, the best
        stay = min(stay, config.keep_last + 1 + best + nth + references)
    each = checkpoint_bytes(run.config.update, policy)
    need, found = stay * each, f"{gib(free)} free at {place}"
    with report.check("disk space", found, f"{gib(need)}: {left} iterations to come") as check:
        if need > free:
            text = f"{gib(free)} free, {gib(need)} needed, since checkpoints of {gib(each)} each stay"
            raise ResourceError(f"{place}: {text}; free some, or lower iterations")
        if not os.access(place, os.W_OK):
            return
        seconds = each / _bytes_per_s(place)
        check.note = (
            f"a checkpoint of {gib(each)} takes about {duration(seconds)}{_how_often(every, seconds)}"
        )


def checkpoint_bytes(update: UpdateConfig, policy: Checkpoint) -> int:
    """Of what trains, and its optimiser state; 0 where the size is not known."""
    if update.lora is None:
        return (FLOAT32 + MOMENTS[update.optimizer]) * (policy.parameters or 0)
    shape = shape_of(load_config(policy.folder)) if policy.folder is not None else None
    trained = 0 if shape is None else adapter_parameters(shape, update.lora)
    return (FLOAT32 + MOMENTS[update.optimizer]) * trained


def _how_often(every: int | str, seconds: float) -> str:
    """What `checkpoints.every: auto` makes of that: who is killed rebuilds no more."""
    if every != "auto":
        return ""
    return f", beside the work: every {duration(min(seconds / SHARE, LONGEST_S))}, and no more is rebuilt"


def _bytes_per_s(place: Path) -> float:
    """What the disk takes, synced."""
    with files.resource_errors(place), tempfile.NamedTemporaryFile(dir=place) as file:
        started = time.perf_counter()
        file.write(os.urandom(_TRIED_BYTES))
        os.fsync(file.fileno())
        return _TRIED_BYTES / max(time.perf_counter() - started, 1e-6)


def gib(num_bytes: float) -> str:
    """A size for a person: `7.4 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.0f} MiB"
