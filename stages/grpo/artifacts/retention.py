"""artifacts.retention: what is dropped from committed outputs to save space. Tables are never dropped.

A checkpoint is what an update wrote for its successor: weights, adapter and optimiser state. `pruned.json` is
committed before the files go, so that their absence is never taken for damage. It holds nothing: that it is
there is all that counts, and damage to it cannot change what was dropped.
"""

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.active import ActiveRun
from grpo.artifacts.best import best_of
from grpo.artifacts.layout import EVALUATION
from grpo.artifacts.run import PRUNED, Run


def prunable(run: ActiveRun) -> list[int]:
    """Updates whose checkpoint `checkpoints` does not keep, oldest first. Never one of the newest two."""
    have = [iteration for iteration in run.iterations() if run.has_checkpoint(iteration)]
    best = _best(run, have)
    return [iteration for iteration in have if iteration not in best and not is_kept(run, iteration, have)]


def is_kept(run: ActiveRun, iteration: int, have: list[int]) -> bool:
    """Whether the checkpoint of an update stays, the best or not, among updates that `have` one, in order."""
    keep_last = run.config.checkpoints.keep_last
    if keep_last is None or len(have) - bisect_right(have, iteration) < keep_last:
        return True
    return _outlives(run, iteration, have[-keep_last])


def _outlives(run: ActiveRun, iteration: int, oldest: int) -> bool:
    """Whether the checkpoint of an update before `oldest`, the first of the newest, stays all the same.

    As one of every nth, or as the reference of a policy that is kept: to go on from that takes both.
    """
    # Update i writes policy i + 1, and it is policies that people count.
    keep_every, moves = run.config.checkpoints.keep_every, run.config.update.reference_every
    if keep_every is not None and (iteration + 1) % keep_every == 0:
        return True
    if moves is None or (iteration + 1) % moves:
        return False
    next_reference = iteration + moves
    next_nth = (iteration // keep_every + 1) * keep_every - 1 if keep_every else next_reference
    return next_reference > oldest or next_nth < next_reference


def _best(run: ActiveRun, have: Iterable[int]) -> set[int]:
    """The update of those given whose policy was measured to be the best, and that of its reference.

    Empty: none was measured, or the best may go.
    """
    if not run.config.checkpoints.keep_best:
        return set()
    found = best_of(run, [iteration + 1 for iteration in have if _is_measured(run, iteration + 1)])
    return {found.policy - 1, run.config.update.moved_reference(found.policy) - 1} if found else set()


def _is_measured(run: ActiveRun, policy: int) -> bool:
    return run.folder(EVALUATION, policy).exists()


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
    """Drop what the update `newest`, or the evaluation of its policy, moved out of the checkpoints kept.

    That is all that prune() would find after it. The cost does not grow with the run, only with its
    evaluations where one decides: behind a checkpoint that is gone, all that were to go but the best went.
    """
    keep_last = run.config.checkpoints.keep_last
    if keep_last is None:
        return
    if run.manifest("update", newest + 1) is not None:  # it was made again: others are newer
        prune(run)
        return
    have: list[int] = []
    for iteration in range(newest, -1, -1):
        if len(have) >= keep_last and _outlives(run, iteration, have[keep_last - 1]):
            continue
        if not run.has_checkpoint(iteration):
            break
        have.append(iteration)
    going = set(have[keep_last:])
    oldest, best = have[:keep_last][-1], set[int]()
    moves = run.config.update.reference_every  # then what goes may be the reference of the best
    if moves or any(_is_measured(run, iteration + 1) for iteration in (newest, *going)):
        there = {policy - 1 for policy in run.evaluations() if policy and run.has_checkpoint(policy - 1)}
        going |= {number for number in there if number not in have and not _outlives(run, number, oldest)}
        best = _best(run, sorted(there))
    for written in {run.config.update.moved_reference(iteration + 1) - 1 for iteration in going} - {-1}:
        # It may have been kept for these alone.
        if run.has_checkpoint(written) and not _outlives(run, written, oldest):
            going.add(written)
    going -= best
    _drop(run, sorted(going), [path for iteration in sorted(going) for path in _there(run, iteration)])


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
