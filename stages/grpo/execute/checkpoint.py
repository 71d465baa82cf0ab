"""checkpoint: a folder of weights that another process is to read, maybe of another machine."""

import platform
import time
from pathlib import Path
from typing import NamedTuple

from grpo.artifacts import checkpoint_files
from grpo.errors import ResourceError

SEEN_S = 60


class Checkpoint(NamedTuple):
    """One of them; sizes: of its files, in bytes."""

    folder: Path
    sizes: dict[str, int]

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint":
        """The one that is in `folder`."""
        folder = folder.resolve()
        return cls(folder, {path.name: path.stat().st_size for path in checkpoint_files(folder)})

    def seen(self) -> Path:
        """The folder, as soon as all of it is seen here: on a shared store, names come late to others.

        Raises ResourceError (exit 7) where it is not, SEEN_S later.
        """
        until = time.monotonic() + SEEN_S
        while missing := [name for name, size in self.sizes.items() if _size_of(self.folder / name) != size]:
            if time.monotonic() > until:
                raise ResourceError(
                    f"execution: {platform.node()} does not see {self.folder / missing[0]} as it was written;"
                    " it has to be on a store that every node has at the same path"
                )
            time.sleep(0.1)
        return self.folder


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # not there yet, or a handle of a file that was
        return None
