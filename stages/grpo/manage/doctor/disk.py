"""disk: room for the checkpoints of a run."""

import shutil
from pathlib import Path

from grpo.artifacts import ActiveRun
from grpo.errors import ResourceError
from grpo.manage.doctor.check import Check, failed, gib
from grpo.manage.doctor.checkpoint import Checkpoint

WEIGHT_BYTES, OPTIMIZER_BYTES = 4, 8  # of a parameter in a committed checkpoint, float32


def check_space(run: ActiveRun, policy: Checkpoint) -> list[Check]:
    """Free space against the checkpoints still to come; nothing where the model's size is not known."""
    if policy.parameters is None:
        return []
    place = _existing(run.root)
    free = shutil.disk_usage(place).free
    done = sum(run.manifest("update", iteration) is not None for iteration in run.iterations())
    left = max(0, run.config.iterations - done)
    config = run.config.checkpoints
    stay = left
    if config.keep_last is not None:
        # One more than is kept: the oldest goes when the newest is committed.
        stay = min(left, config.keep_last + 1 + (left // config.keep_every if config.keep_every else 0))
    # That of an adapter is left out: it is a small part of the weights.
    optimizer_bytes = 0 if run.config.update.lora else OPTIMIZER_BYTES
    need = stay * (WEIGHT_BYTES + optimizer_bytes) * policy.parameters
    found, needed = f"{gib(free)} free at {place}", f"{gib(need)}: {left} iterations to come"
    if need <= free:
        return [Check("disk space", found, needed, note="left out: the tables, about 4 bytes per token")]
    each = gib((WEIGHT_BYTES + optimizer_bytes) * policy.parameters)
    text = f"{place}: {gib(free)} free, {gib(need)} needed, since checkpoints of {each} each stay"
    return [failed("disk space", found, needed, ResourceError(f"{text}; free some, or lower iterations"))]


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there: where a run would make it."""
    absolute = folder.absolute()
    found = next(path for path in (absolute, *absolute.parents) if path.exists())
    return folder if found == absolute else found
