"""artifacts.retention: what is dropped from committed outputs to save space. Tables are never dropped.

A checkpoint is what an update wrote for its successor: weights, adapter and optimiser state. `pruned.json` is
committed before the files go, so that their absence is never taken for damage. It holds nothing: that it is
there is all that counts, and damage to it cannot change what was dropped.
"""

from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.run import PRUNED, Run


def prunable(run: Run) -> list[int]:
    """Updates whose checkpoint `checkpoints` does not keep, oldest first. Never one of the newest two."""
    have = [iteration for iteration in run.iterations() if run.has_checkpoint(iteration)]
    return [iteration for iteration in have if not is_kept(run, iteration, have)]


def is_kept(run: Run, iteration: int, have: list[int]) -> bool:
    """Whether the checkpoint of an update stays, among the updates that `have` one."""
    config = run.config.checkpoints
    if config.keep_last is None or sum(number > iteration for number in have) < config.keep_last:
        return True
    # Update i writes policy i + 1, and it is policies that people count.
    return config.keep_every is not None and (iteration + 1) % config.keep_every == 0


def droppable(run: Run) -> dict[int, list[Path]]:
    """Update -> files that prune() would remove: of checkpoints not kept, and what a crash left of such."""
    going, found = prunable(run), {}
    for iteration in run.iterations():
        if iteration in going or run.is_pruned(iteration):
            there = [run.path_of(file, "update", iteration) for file in run.checkpoint_records(iteration)]
            paths = [path for path in there if path.exists()]
            if paths or iteration in going:
                found[iteration] = paths
    return found


def prune(run: Run) -> None:
    """Drop the checkpoints that are not kept, and what a crash left of such."""
    for iteration in prunable(run):
        files.mark(run.folder("update", iteration) / PRUNED)
    for paths in droppable(run).values():
        for path in paths:
            files.remove_file(path)
