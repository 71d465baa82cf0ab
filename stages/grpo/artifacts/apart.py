"""artifacts.apart: files of an output that several processes write, and the one that commits takes over.

Until then a file has a name of this try alone: a process that outlives its try touches nothing of the next.
"""

import platform
import time
from collections.abc import Iterable
from pathlib import Path

from grpo.artifacts import files
from grpo.artifacts.manifest import FileRecord
from grpo.errors import ResourceError

SEEN_S = 60.0  # after which a name that another machine has made is missing: on a shared store some come late


def write_apart(
    folder: Path, part: str, name: str, mark: str, content: bytes | Iterable[bytes | memoryview]
) -> FileRecord:
    """In any process: write a file of the output that is staged in `folder`; it is on disk, its name too.

    mark: of this try. Raises ResourceError (exit 7) where the folder, which is made before, is not seen here.
    """
    place = folder / part
    _see(place, None)
    chunks = [content] if isinstance(content, bytes) else content
    num_bytes, digest = files.write_chunks(_marked(place / name, mark), chunks)
    files.sync_folder(place)  # here, where its entry was made
    return FileRecord.model_validate({"name": name, "part": part, "bytes": num_bytes, "sha256": digest})


def take_over(folder: Path, record: FileRecord, mark: str) -> None:
    """In the process that commits: give a file that write_apart() wrote its name.

    Raises ResourceError (exit 7) where it is not seen here as it was written.
    """
    path = folder / record.part / record.name
    _see(_marked(path, mark), record.bytes)
    files.move(_marked(path, mark), path)


def _marked(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.name}.{mark}")


def _see(path: Path, num_bytes: int | None) -> None:
    until = time.monotonic() + SEEN_S
    while not path.exists() or num_bytes not in (None, path.stat().st_size):
        if time.monotonic() > until:
            raise ResourceError(
                f"{path}: is not seen on {platform.node()} as it was written elsewhere; artifacts have to be"
                " on a store that every process has at the same path"
            )
        time.sleep(0.1)
