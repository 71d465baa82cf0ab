"""artifacts.replaced: outputs that a rerun has replaced, as long as .trash holds them."""

import re
from pathlib import Path

from grpo.artifacts.layout import iteration_folder
from grpo.artifacts.manifest import Manifest, read_manifest
from grpo.artifacts.run import Run


def replaced(run: Run, output: str, iteration: int) -> list[tuple[Path, Manifest]]:
    """Earlier outputs of an iteration, made of what is there still: folder and manifest, newest first.

    discard() has numbered them. `grpo gc` removes them.
    """
    name = re.compile(rf"{re.escape(f'{iteration_folder(iteration)}-{output}')}\.([0-9]{{1,9}})")
    paths = run.trash.iterdir() if run.trash.is_dir() else ()
    numbered = {int(match[1]): path for path in paths if (match := name.fullmatch(path.name))}
    found = []
    for _, path in sorted(numbered.items(), reverse=True):
        manifest = None if path.is_symlink() else read_manifest(path)
        if manifest is None or manifest.iteration != iteration:
            continue
        if all(run.id_of(reference) == id_ for reference, id_ in manifest.inputs.items()):
            found.append((path, manifest))
    return found
