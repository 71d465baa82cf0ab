"""artifacts.retention: what is dropped from committed outputs to save space. Tables are never dropped.

A checkpoint is what an update wrote for its successor: weights, adapter and optimiser state. `pruned.json` is
committed before the files go, so that their absence is never taken for damage. It holds nothing: that it is
there is all that counts, and damage to it cannot change what was dropped.
"""

from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.manifest import FileRecord
from grpo.artifacts.run import PRUNED, Run

_PARTS = ("policy", "adapter", "optimizer")
_KEPT = "probe.json"  # a few kilobytes that say what the policy computed


def prunable(run: Run) -> list[int]:
    """Updates whose checkpoint `checkpoints` does not keep, oldest first. Never one of the newest two."""
    config = run.config.checkpoints
    have = [iteration for iteration in run.iterations() if run.has_checkpoint(iteration)]
    if config.keep_last is None:
        return []
    # Update i writes policy i + 1, and it is policies that people count.
    every = config.keep_every
    return [i for i in have[: -config.keep_last] if every is None or (i + 1) % every]


def droppable(run: Run) -> dict[int, list[Path]]:
    """Update -> files that prune() would remove: of checkpoints not kept, and what a crash left of such."""
    going, found = prunable(run), {}
    for iteration in run.iterations():
        if iteration in going or run.is_pruned(iteration):
            there = [run.path_of(file, "update", iteration) for file in checkpoint_records(run, iteration)]
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


def checkpoint_records(run: Run, iteration: int) -> list[FileRecord]:
    """Files of an update that are gone, or go, when its checkpoint is pruned."""
    manifest = run.manifest("update", iteration)
    held = manifest.files if manifest else []
    return [file for file in held if file.part in _PARTS and file.name != _KEPT]
