"""modules: the Python files beside pipeline.yaml, as bytes, for machines that do not have them.

A module of the user's may import any other of them, so all go.
"""

import os
import platform
from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path
from typing import NamedTuple

from grpo.errors import EngineError, UsageError
from grpo.score.functions.workspace import Workspace

MAX_MIB = 8  # of all files together: they go with each shard
_SUFFIXES = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)
_NOT_OURS = ("__pycache__", "node_modules", "site-packages")


class Modules(NamedTuple):
    """The files of `folder`, by their path in it; none where every machine is the one that has it."""

    folder: Path
    files: dict[str, bytes]
    digest: str

    @classmethod
    def of(cls, folder: Path, leave_out: Path) -> "Modules":
        """Those below `folder`, but for what is in `leave_out`, in hidden folders and in environments.

        Raises UsageError (exit 2) where they are more than MAX_MIB.
        """
        folder, files, left = folder.resolve(), dict[str, bytes](), MAX_MIB * 2**20
        seen = {leave_out.resolve()}
        for name, subfolders, names in os.walk(folder, followlinks=True):
            place = Path(name)
            seen.add(place.resolve())
            subfolders[:] = [each for each in subfolders if _is_ours(place / each, seen)]
            for path in (place / each for each in sorted(names) if each.endswith(_SUFFIXES)):
                if path.is_file():
                    left -= path.stat().st_size
                    if left < 0:
                        raise UsageError(_too_many(folder))
                    files[path.relative_to(folder).as_posix()] = path.read_bytes()
        return cls(folder, files, _digest(files))

    @classmethod
    def none(cls, folder: Path) -> "Modules":
        """For this machine: they are there."""
        return cls(folder.resolve(), {}, _digest({}))

    def arrive(self, workspace: Workspace) -> Path:
        """Where they are on this machine: the folder itself, if it is the same here, else in `workspace`.

        In the folder itself there is also what functions read beside them. Raises EngineError (exit 8) for
        bytes that are not what was sent.
        """
        if _digest(self.files) != self.digest:
            raise EngineError(
                f"execution.scorers: the modules of {self.folder} came to {platform.node()} damaged (sha256"
                " differs); run the same command again"
            )
        return self.folder if self._are_here() else workspace.put(self.files)

    def _are_here(self) -> bool:
        places = {self.folder / name: content for name, content in self.files.items()}
        return all(path.is_file() and path.read_bytes() == content for path, content in places.items())


def _is_ours(folder: Path, seen: set[Path]) -> bool:
    is_environment = (folder / "pyvenv.cfg").exists()
    hidden = folder.name.startswith(".") or folder.name in _NOT_OURS
    return not hidden and not is_environment and folder.resolve() not in seen


def _digest(files: dict[str, bytes]) -> str:
    lines = [f"{sha256(files[name]).hexdigest()} {name}\n" for name in sorted(files)]
    return sha256("".join(lines).encode()).hexdigest()


def _too_many(folder: Path) -> str:
    return (
        f"execution.scorers: the Python files below {folder} are more than {MAX_MIB} MiB, and go to other"
        " machines with each shard; a folder with pipeline.yaml and its own modules alone is right"
    )
