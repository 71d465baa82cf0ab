"""artifacts.manifest: what an output holds, what it read, and the fingerprint it was planned under.

`Plan` is what a stage is about to do; `Manifest` is what it did. An output is stale when something it read
has another id now, and differs when only configuration, the user's code or STAGE_VERSION changed.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from grpo.artifacts.recorded import MAX_DEPTH, Count, Iteration, Number, Recorded, check_content
from grpo.config import differing_keys
from grpo.config.depth import check_depth
from grpo.errors import CorruptError, InputError, unreadable
from grpo.tables import TABLES

SCHEMA_VERSION = 3  # 2: inputs and user_files; 3: checkpoints are an output of their own
MANIFEST = "manifest.json"
_PARTS = ("ids", "config", "user_files", "summary", "execution")

FileName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)
]  # bare: no path can leave its folder


def _known_table(name: str) -> str:
    if name not in TABLES:
        raise ValueError(f"no table is called {name[:80]}")
    return name


class FileRecord(BaseModel):
    """One file of an output. Example: part-00003-1f2e3d4c.parquet, 2048 rows of table rollouts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FileName
    part: Literal["", "policy", "optimizer", "adapter"] = ""
    """Folder within the output."""
    bytes: Count
    sha256: str
    rows: Count | None = None
    """Rows of a Parquet file; null for any other file."""
    table: Annotated[str, AfterValidator(_known_table)] | None = None
    """Table whose rows the file holds; null for any other file."""
    unit: str | None = None
    """Digest of all this shard alone depends on, for stages that keep unchanged shards."""
    labels: Annotated[dict[str, Any], AfterValidator(partial(Recorded, "a file of an output"))] = {}
    """What a stage notes of its shard, such as the reward's name."""

    def of_rows(self, table: str, rows: int, unit: str | None, labels: dict[str, Any]) -> "FileRecord":
        """The record of a Parquet file of rows."""
        return self.model_copy(update={"rows": rows, "table": table, "unit": unit, "labels": labels})


class Manifest(BaseModel):
    """The commit record of an output: what a reader trusts, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    stage: str
    stage_version: Number
    iteration: Iteration | None
    attempt: Number
    fingerprint: str
    ids: dict[str, str]
    """Name of each thing the output holds -> id (a digest of its content)."""
    inputs: dict[str, str]
    """Reference of each thing the stage read, such as rollouts@3 -> its id then."""
    config: dict[str, Any]
    """The part of the configuration the stage depends on."""
    user_files: dict[str, str]
    """The user's own files and models by name -> sha256."""
    files: list[FileRecord]
    rows: Count
    summary: dict[str, Any]
    """Numbers worth showing; they follow from the rows."""
    execution: dict[str, Any] = {}
    """What its bits depend on beside all above, such as threads; recorded where they can be recomputed."""
    versions: dict[str, str]
    """Of this package, its git revision and the libraries; recorded, never compared."""

    def recorded(self) -> dict[str, Any]:
        """As it is written."""
        return self.model_dump(exclude=None if self.execution else {"execution"})


@dataclass(frozen=True)
class Plan:
    """What a stage is about to do: all that its output depends on."""

    stage: str
    stage_version: int
    output: str
    iteration: int | None
    config: dict[str, Any]
    inputs: dict[str, str]
    user_files: dict[str, str] = field(default_factory=dict)
    shards: Any = None
    """The shard plan: how the work is cut."""

    def fingerprint(self, attempt: int) -> str:
        """sha256 over everything above and the attempt."""
        return digest({**self.__dict__, "attempt": attempt})

    def differences(self, manifest: Manifest) -> list[str]:
        """What changed since `manifest` besides what was read: one text `key: old -> new` each."""
        texts = differing_keys(manifest.config, self.config)
        for name in sorted(self.user_files.keys() & manifest.user_files.keys()):
            if self.user_files[name] != manifest.user_files[name]:
                texts.append(f"{name}: its file changed")
        if manifest.stage_version != self.stage_version:
            texts.append(f"{self.stage} version: {manifest.stage_version} -> {self.stage_version}")
        return texts

    def same_as(self, manifest: Manifest) -> bool:
        """Whether `manifest` committed exactly this plan."""
        return self.fingerprint(manifest.attempt) == manifest.fingerprint


@dataclass(frozen=True)
class Product:
    """What a stage has made of a plan, before it is committed."""

    ids: dict[str, str]
    """Name of each thing the output holds -> id."""
    files: list[FileRecord]
    """Every file of the output, in order."""
    summary: dict[str, Any]
    """Numbers worth showing; they follow from the rows."""
    execution: dict[str, Any] = field(default_factory=dict)
    """What its bits depend on beside the plan, where that is recorded."""


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def id_of(files: list[FileRecord]) -> str:
    """Id of what `files` hold together: a digest of their content, in order, whatever they are called."""
    return digest([file.sha256 for file in files])


def changed(place: object) -> CorruptError:
    """What is raised for a content, at a path or an address, that is not the one that was committed."""
    return CorruptError(f"{place}: content changed since it was committed (sha256 differs)")


def check_recorded(record: FileRecord, found: tuple[int, str], place: object) -> None:
    """Raise CorruptError (exit 6) unless `found`, length in bytes and sha256, are as recorded."""
    if found != (record.bytes, record.sha256):
        raise changed(place)


def seal(data: dict[str, Any]) -> bytes:
    """A JSON file of `data` and the digest of it that finds damage."""
    return (json.dumps({**data, "sha256": digest(data)}, indent=1, allow_nan=False) + "\n").encode()


def unseal(path: Path | str, data: dict[str, Any]) -> dict[str, Any]:
    """What seal() was given, from the parsed file at `path`. Raises CorruptError (exit 6) when it changed."""
    held = {key: value for key, value in data.items() if key != "sha256"}
    try:
        same = data.get("sha256") == digest(held)
    except (ValueError, RecursionError):  # NaN or infinity, or nested as seal() could not write it
        same = False
    if not same:
        raise changed(path)
    try:
        check_depth(held, MAX_DEPTH)
    except ValueError as error:
        raise CorruptError(f"{path}: {error}") from None
    return held


def parse_json(path: Path) -> Any:
    """The content of a JSON file. Raises CorruptError (exit 6) when it is none, FileNotFoundError."""
    try:
        if not S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe would be waited for
            raise CorruptError(f"{path}: is no file")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: is not JSON: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:  # a folder in its place, say
        raise unreadable(path, error) from None


def read_json(path: Path, **keys: type) -> dict[str, Any]:
    """The JSON object in `path`, with at least `keys` of these types; else CorruptError (exit 6)."""
    data = parse_json(path)
    if not isinstance(data, dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(data).__name__}")
    if missing := [key for key, kind in keys.items() if not isinstance(data.get(key), kind)]:
        raise CorruptError(f"{path}: has no {missing[0]} of type {keys[missing[0]].__name__}")
    return data


def read_sealed(path: Path, **keys: type) -> dict[str, Any]:
    """The same of a file that seal() wrote; CorruptError also where its content changed since."""
    return unseal(path, read_json(path, **keys))


def check_size(file: FileRecord, path: Path) -> None:
    """Raise CorruptError unless `path` is there with the recorded size."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing, though its manifest lists it") from None
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror}, though its manifest lists it") from None
    if found.st_size != file.bytes:
        raise CorruptError(f"{path}: {found.st_size} bytes, but its manifest says {file.bytes}")
    if not S_ISREG(found.st_mode):
        raise CorruptError(f"{path}: is no file")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the output in `folder`, or None when nothing is committed there.

    Raises CorruptError (exit 6) when it cannot be parsed, InputError when a newer version wrote it.
    """
    path = folder / MANIFEST
    try:
        found = path.stat()
        return _parsed(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a link to itself, say
        raise unreadable(path, error) from None


@lru_cache(maxsize=2**8)
def _parsed(path: Path, *_: int) -> Manifest:
    """The manifest at `path`, read once for each file that is there.

    Room for those that the work on an iteration asks for again and again: a long run must not keep them all.
    """
    return manifest_of(path, parse_json(path))


def manifest_of(path: Path | str, data: Any) -> Manifest:
    """The manifest that the parsed content of `path` is. Raises as read_manifest()."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: written by a newer grpo (schema {version}, this one reads up to {SCHEMA_VERSION})"
        )
    if version in range(1, SCHEMA_VERSION):
        raise InputError(
            f"{path}: written by an older grpo (schema {version}, this one reads {SCHEMA_VERSION}); read it"
            " with the release that wrote it, or make a new `run:`"
        )
    held = unseal(path, data if isinstance(data, dict) else {})
    try:
        manifest = Manifest.model_validate(held)
        check_content(held)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path}: {place}: {first['msg'].lower()}") from None
    except ValueError as error:
        raise CorruptError(f"{path}: {error}") from None
    parts = {name: Recorded(path, getattr(manifest, name)) for name in _PARTS}
    return manifest.model_copy(update=parts)
