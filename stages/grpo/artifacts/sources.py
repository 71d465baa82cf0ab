"""artifacts.sources: texts of the user's that a run was made with, kept in it: its rewards can be read.

`sources/<sha256>-<name>`; manifests have the sha256 in `user_files`. No stage reads them, nothing runs them.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.run import Run
from grpo.errors import CorruptError

SOURCES = "sources"


def keep_source(run: Run, digest: str, name: str, read: Callable[[], bytes]) -> None:
    """Keep a text under the digest that a plan has of it. Edited since then, it is left to the next plan."""
    path = run.path / SOURCES / f"{digest}-{name}"
    if path.exists() or sha256(content := read()).hexdigest() != digest:
        return
    files.make_folder(path.parent)
    files.write_file(path, content)
    files.sync_folder(path.parent)


def kept_sources(run: Run) -> dict[str, Path]:
    """sha256 -> the kept text, by what its name says."""
    folder = run.path / SOURCES
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {name[:64]: folder / name for name in sorted(names) if re.fullmatch("[0-9a-f]{64}-.+", name)}


def check_source(digest: str, path: Path) -> None:
    """Raise CorruptError (exit 6) where a kept text is not what it was."""
    if not path.is_file() or files.sha256_of(path) != digest:
        raise CorruptError(f"{path}: content changed since it was kept (sha256 differs)")
