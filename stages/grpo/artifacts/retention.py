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
    have = [number for number in run.iterations() if run.has_optimizer(number)]
    for iteration in have[:-keep]:
        manifest = run.manifest("update", iteration)
        assert manifest is not None
        records = [file for file in manifest.files if file.part == "optimizer"]
        folder = run.folder("update", iteration)
        content = json.dumps({"files": [f"{file.part}/{file.name}" for file in records]})
        files.write_file(folder / "pruned.json", content.encode())
        files.sync_folder(folder)
        for file in records:
            files.remove_file(folder / file.part / file.name)
