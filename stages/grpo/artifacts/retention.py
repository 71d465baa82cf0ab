"""artifacts.retention: which checkpoints stay. Tables are never dropped, so no policy is lost with one."""

from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.active import ActiveRun
from grpo.artifacts.best import best_of
from grpo.artifacts.layout import CHECKPOINT, EVALUATION, iterations_in
from grpo.artifacts.manifest import MANIFEST
from grpo.artifacts.policies import durable_policies
from grpo.artifacts.run import Run
from grpo.artifacts.staging import discard, staging_folders


def kept(run: ActiveRun, have: list[int], keep_last: int | None = None) -> set[int]:
    """Of the durable policies `have`, in order, those that stay.

    keep_last: so many of the newest; None: what `checkpoints` keeps.
    """
    config = run.config.checkpoints
    if keep_last is not None:
        stay = {*have[-keep_last:]}
    elif config.keep_last is None:
        return set(have)
    else:
        nth = [policy for policy in have if config.keep_every and policy % config.keep_every == 0]
        stay = {*have[-config.keep_last :], *nth, *_best(run, have)}
    # To go on from a policy takes its reference too: without that, a replay from far behind.
    return stay | {run.config.update.moved_reference(policy) for policy in stay}


def droppable(run: ActiveRun, keep_last: int | None = None) -> dict[int, list[Path]]:
    """Update -> folders that prune() would remove: checkpoints not kept, superseded, and unfinished ones.

    Raises CorruptError (exit 6) for a damaged one: that does not go without a word.
    """
    found: dict[int, list[Path]] = {}
    with run.steady():
        have = durable_policies(run)
        stay = kept(run, have[1:], keep_last)
        for number in iterations_in(run.path):
            folder = run.folder(CHECKPOINT, number)
            if folder.exists() and number + 1 not in stay:
                found.setdefault(number, []).append(folder)
    for folder, (output, iteration) in staging_folders(run).items():
        if output == CHECKPOINT and iteration is not None and not (folder / MANIFEST).exists():
            found.setdefault(iteration, []).append(folder)
    return found


def prune(run: ActiveRun, keep_last: int | None = None) -> None:
    """Remove them; needs the lock, and that none is being written."""
    for folders in droppable(run, keep_last).values():
        for folder in folders:
            drop(run, folder)
    for path in run.trash.glob(f"*-{CHECKPOINT}*") if run.trash.is_dir() else ():
        files.remove(path)  # a crash came between


def prune_known(run: ActiveRun, have: list[int]) -> list[int]:
    """Remove those of the durable policies `have`, in order, that are not kept; returns the others.

    Its cost does not grow with the run.
    """
    stay = kept(run, have)
    for policy in have:
        if policy not in stay:
            drop(run, run.folder(CHECKPOINT, policy - 1))
    return [policy for policy in have if policy in stay]


def drop(run: Run, folder: Path) -> None:
    """Remove a checkpoint, out of its place first: half of one is never taken for one."""
    if (place := discard(run, folder)) is not None:
        files.remove(place)


def _best(run: ActiveRun, have: list[int]) -> list[int]:
    """The best of the policies `have` that were measured, unless it may go."""
    if not run.config.checkpoints.keep_best:
        return []
    measured = [policy for policy in have if run.folder(EVALUATION, policy).exists()]
    found = best_of(run, measured)
    return [found.policy] if found else []
