"""space: what the checkpoints of a run take, against the disk that is there."""

import shutil

from grpo.artifacts import ActiveRun
from grpo.errors import ResourceError
from grpo.manage.doctor.inputs import Checkpoint
from grpo.manage.doctor.report import Report
from grpo.update.memory import FLOAT32, MOMENTS


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
    need, found = stay * each, f"{gib(free)} free at {place}"
    with report.check("disk space", found, f"{gib(need)}: {left} iterations to come") as check:
        if need > free:
            text = f"{gib(free)} free, {gib(need)} needed, since checkpoints of {gib(each)} each stay"
            raise ResourceError(f"{place}: {text}; free some, or lower iterations")
        check.note = "left out: the tables, about 4 bytes per token"


def gib(num_bytes: float) -> str:
    """A size for a person: `7.4 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.0f} MiB"
