"""layout: where the outputs of a run are in its mirror, and what a listing holds.

`iteration=000003/rollouts-<fp16>/part-....parquet`: the files of an output, in a folder that has the first 16
digits of its fingerprint, so that another attempt has another one. `iteration=000003/rollouts/manifest.json`:
the only marker, written when they are there. Notes and kept sources have the names that they have in a run.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from grpo.artifacts import CHECKPOINT, MANIFEST, OUTPUTS, RUN_OUTPUTS, SOURCES, FileRecord, Manifest
from grpo.artifacts.layout import is_iteration, iteration_folder
from grpo.artifacts.manifest import manifest_of
from grpo.config import PIPELINE
from grpo.errors import CorruptError
from grpo.mirror.store import Found

Place = tuple[str, int | None]
"""An output and its iteration; None: of the run as a whole."""
NOTES = ("run.json", PIPELINE, "stopped.json", ".track.json")
"""Files of a run that are no output: copied as they are now."""
_OF_ITERATION = (*OUTPUTS, CHECKPOINT)
_KEY = re.compile(r"(?P<output>[a-z_]+)(?:/manifest\.json|-(?P<fp>[0-9a-f]{16})/.+)")
_FINGERPRINT = re.compile("[0-9a-f]{64}")
_SOURCE = re.compile(r"[0-9a-f]{64}-[^/\0]{1,180}")


@dataclass
class Holdings:
    """What a mirror holds of one run, by keys relative to its folder."""

    manifests: dict[Place, str] = field(default_factory=dict)
    """Etag of the manifest of each output that is whole."""
    folders: dict[Place, dict[str, list[str]]] = field(default_factory=dict)
    """First 16 digits of a fingerprint -> keys of files, of every attempt at an output."""
    notes: dict[str, str] = field(default_factory=dict)
    """Etag of each of NOTES."""
    sources: dict[str, str] = field(default_factory=dict)
    """Name of a kept source -> its key."""


def holdings(found: Iterable[Found], run: str) -> Holdings:
    """What a listing of the folder of a run means; keys of other kinds are not ours."""
    held = Holdings()
    for each in found:
        key = each.key.removeprefix(f"{run}/")
        folder, _, name = key.rpartition("/")
        if key in NOTES:
            held.notes[key] = each.etag
        elif folder == SOURCES and _SOURCE.fullmatch(source := _plain(name)):
            held.sources[source] = key
        elif place := _place_of(key):
            output, iteration, fingerprint = place
            if fingerprint is None:
                held.manifests[output, iteration] = each.etag
            else:
                held.folders.setdefault((output, iteration), {}).setdefault(fingerprint, []).append(key)
    return held


def in_order(places: Iterable[Place]) -> list[Place]:
    """Places in the order in which a run makes them: what an output is made from comes before it."""
    order = [*RUN_OUTPUTS, *_OF_ITERATION]
    return sorted(places, key=lambda place: (-1 if place[1] is None else place[1], order.index(place[0])))


def manifest_key(place: Place) -> str:
    """Key of the marker of an output."""
    return _within(place[1], f"{place[0]}/{MANIFEST}")


def files_folder(place: Place, fingerprint: str) -> str:
    """Folder of the files of one attempt at an output."""
    return _within(place[1], f"{place[0]}-{fingerprint[:16]}")


def file_key(folder: str, record: FileRecord) -> str:
    """Key of a file of an output, whose files are in `folder`."""
    return f"{folder}/{record.part}/{record.name}" if record.part else f"{folder}/{record.name}"


def source_key(name: str) -> str:
    """Key of a kept source, whose name may hold what no key may."""
    return f"{SOURCES}/{quote(name, safe='').replace('%', '=')}"


def text_of(place: Place) -> str:
    """A place in words: `rollouts of iteration 3`."""
    return place[0] if place[1] is None else f"{place[0]} of iteration {place[1]}"


def parsed(place: Place, path: Path | str, content: bytes) -> Manifest:
    """The manifest of an output, read at `path`. CorruptError (exit 6) for what is none, InputError (4)."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: is not JSON: {error}") from None
    found = manifest_of(path, data)
    if (found.stage, found.iteration) != (OUTPUTS.get(place[0], place[0]), place[1]):
        raise CorruptError(f"{path}: is of {text_of((found.stage, found.iteration))}")
    if not _FINGERPRINT.fullmatch(found.fingerprint):  # it names a folder
        raise CorruptError(f"{path}: fingerprint: expected 64 hexadecimal digits")
    return found


def _plain(name: str) -> str:
    return unquote(name.replace("=", "%"), errors="replace")


def _within(iteration: int | None, key: str) -> str:
    return key if iteration is None else f"{iteration_folder(iteration)}/{key}"


def _place_of(key: str) -> tuple[str, int | None, str | None] | None:
    first, _, rest = key.partition("/")
    iteration = int(first.partition("=")[2]) if is_iteration(first) else None
    match = _KEY.fullmatch(key if iteration is None else rest)
    known = RUN_OUTPUTS if iteration is None else _OF_ITERATION
    return (match["output"], iteration, match["fp"]) if match and match["output"] in known else None
