"""artifacts.retention: what is dropped from committed outputs to save space. Tables are never dropped."""

import json

from grpo.artifacts import files
from grpo.artifacts.run import Run


def prune_optimizers(run: Run) -> None:
    """Drop all but the newest `checkpoints.keep_optimizers` optimiser states.

    `pruned.json` is committed before the files go, so that their absence is never taken for damage.
    """
    keep = run.config.checkpoints.keep_optimizers
    if keep is None:
        return
    for iteration in [number for number in run.iterations() if run.has_optimizer(number)][:-keep]:
        folder = run.folder("update", iteration)
        content = json.dumps({"parts": ["optimizer"]})
        files.write_file(folder / "pruned.json", content.encode())
        files.sync_folder(folder)
    for iteration in run.iterations():
        manifest = run.manifest("update", iteration)
        if manifest is None or run.has_optimizer(iteration):
            continue
        folder = run.folder("update", iteration)
        for file in (file for file in manifest.files if file.part == "optimizer"):
            files.remove_file(folder / file.part / file.name)
