"""artifacts.retention: what is dropped from committed outputs to save space. Tables are never dropped.

A checkpoint is what an update wrote for its successor: weights, adapter and optimiser state. `pruned.json` is
committed before the files go, so that their absence is never taken for damage. It holds nothing: that it is
there is all that counts, and damage to it cannot change what was dropped.
"""

from bisect import bisect_right
from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.active import ActiveRun
from grpo.artifacts.run import PRUNED, Run


def prunable(run: ActiveRun) -> list[int]:
    """Updates whose checkpoint `checkpoints` does not keep, oldest first. Never one of the newest two."""
    have = [iteration for iteration in run.iterations() if run.has_checkpoint(iteration)]
    return [iteration for iteration in have if not is_kept(run, iteration, have)]


def is_kept(run: ActiveRun, iteration: int, have: list[int]) -> bool:
    """Whether the checkpoint of an update stays, among the updates that `have` one, in order."""
    config = run.config.checkpoints
    if config.keep_last is None or len(have) - bisect_right(have, iteration) < config.keep_last:
        return True
    return _is_nth(run, iteration)


def _is_nth(run: ActiveRun, iteration: int) -> bool:
    keep_every = run.config.checkpoints.keep_every
    # Update i writes policy i + 1, and it is policies that people count.
    return keep_every is not None and (iteration + 1) % keep_every == 0


def droppable(run: ActiveRun) -> dict[int, list[Path]]:
    """Update -> files that prune() would remove: of checkpoints not kept, and what a crash left of such."""
    with run.steady():
        going, found = prunable(run), {}
        for iteration in run.iterations():
            if iteration in going or run.is_pruned(iteration):
                paths = _there(run, iteration)
                if paths or iteration in going:
                    found[iteration] = paths
        return found


def prune(run: ActiveRun) -> None:
    """Drop the checkpoints that are not kept, and what a crash left of such."""
    found = droppable(run)
    going = [iteration for iteration in found if run.has_checkpoint(iteration)]
    _drop(run, going, [path for paths in found.values() for path in paths])


def prune_behind(run: ActiveRun, newest: int) -> None:
    """Drop what the update `newest` moved out of the checkpoints kept: all that prune() would find after it.

    The cost does not grow with the run: behind a checkpoint that is gone, all that were to go went before.
    """
    keep_last = run.config.checkpoints.keep_last
    if keep_last is None:
        return
    if run.manifest("update", newest + 1) is not None:  # it was made again: others are newer
        prune(run)
        return
    have: list[int] = []
    for iteration in range(newest, -1, -1):
        if len(have) >= keep_last and _is_nth(run, iteration):
            continue
        if not run.has_checkpoint(iteration):
            break
        have.append(iteration)
    going = sorted(have[keep_last:])
    _drop(run, going, [path for iteration in going for path in _there(run, iteration)])


def _drop(run: Run, going: list[int], paths: list[Path]) -> None:
    for iteration in going:
        files.mark(run.folder("update", iteration) / PRUNED)
    for path in paths:
        files.remove_file(path)


def _there(run: Run, iteration: int) -> list[Path]:
    """Files of a checkpoint that are there."""
    folder = run.folder("update", iteration)
    paths = [folder / file.part / file.name for file in run.checkpoint_records(iteration)]
    return [path for path in paths if path.exists()]
