"""restore: a mirrored run -> its folder, every file held against its manifest. Nothing there is written over.

What was fetched stays where that is cut off, and the same command fetches the rest.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from grpo.artifacts import (
    MANIFEST,
    SOURCES,
    TIMINGS,
    FileRecord,
    Manifest,
    Run,
    check_recorded,
    check_source,
    files,
    is_run,
    lacks_run_json,
    read_sealed,
    refuse_inside_run,
    roll_forward,
)
from grpo.config import mirror_address
from grpo.console import Console
from grpo.errors import CorruptError, InputError, UsageError, listed
from grpo.mirror import layout
from grpo.mirror.layout import Holdings, Place
from grpo.mirror.lease import holder_of
from grpo.mirror.store import Store
from grpo.mirror.upload import committed

_AT_A_TIME = 8
_Given = TypeVar("_Given")
_Found = TypeVar("_Found")
_MIRROR_CHANGED = "the mirror changed while it was read; the same command fetches the rest"


class Source:
    """A mirrored run: the store of its mirror, its name there, and what is held of it."""

    def __init__(self, address: str) -> None:
        try:
            given = mirror_address(address)
        except ValueError as error:
            raise UsageError(f"{address}: {error}") from None
        above, _, self.name = given.rpartition("/")
        if not above.removeprefix("s3:/").strip("/"):
            raise UsageError(f"{address}: a bucket; expected a run in it, s3://bucket/prefix/run")
        self.address = given
        self.store = Store(above)
        self.held: Holdings = layout.holdings(self.store.listing(self.name), self.name)
        if "run.json" not in self.held.notes:
            there = listed(self.store.folders(), self.name) or "none"
            raise UsageError(f"{address}: no such run; runs there: {there}")

    def manifest(self, place: Place) -> tuple[Manifest, bytes]:
        """The manifest of an output, and its bytes. Raises CorruptError (exit 6), InputError (exit 4)."""
        key = layout.manifest_key(place)
        content = self.note(key)
        return layout.parsed(place, f"{self.address}/{key}", content), content

    def manifests(self) -> dict[Place, tuple[Manifest, bytes]]:
        """Those of all outputs, in order. Raises as manifest()."""
        places = layout.in_order(self.held.manifests)
        return dict(zip(places, together(self.manifest, places), strict=True))

    def note(self, key: str) -> bytes:
        """A small object."""
        found = self.store.get(f"{self.name}/{key}")
        if found is None:
            raise InputError(f"{self.address}/{key}: gone; {_MIRROR_CHANGED}")
        return found[0]

    def write(self, key: str, path: Path, record: FileRecord | None = None) -> int:
        """Fetch an object to a file; its bytes. Raises CorruptError (exit 6) where it is not as recorded."""
        num_bytes = 0 if record is None else record.bytes
        try:
            found = files.write_chunks(path, self.store.read(f"{self.name}/{key}", num_bytes))
        except FileNotFoundError:
            raise InputError(f"{self.address}/{key}: gone; {_MIRROR_CHANGED}") from None
        try:
            if record is not None:
                check_recorded(record, found, f"{self.address}/{key}")
        except CorruptError:
            files.remove_file(path)
            raise
        return found[0]


def restore(address: str, out: Path | None, root: Path, console: Console) -> dict[str, Any]:
    """`grpo restore`: fetch a mirrored run to `out`, by default to the folder of its name below `root`.

    Where the run is there, what it lacks is fetched. Raises UsageError (exit 2) for no run, InputError
    (exit 4) where another one is there, CorruptError (exit 6) for a file that is not what was committed.
    """
    source = Source(address)
    target = root / source.name if out is None else out
    if target.name in ("", "..") or target.name.startswith("."):
        raise UsageError(f"--out {target}: expected the folder of the run, such as artifacts/{source.name}")
    refuse_inside_run(target.parent)
    if holder := holder_of(source.store, source.name):
        console.say(f"restore: {source.address} is in use by {holder}; what is committed now is fetched")
    is_there = is_run(target) or lacks_run_json(target)
    if not is_there and target.exists() and [*target.iterdir()]:
        raise UsageError(f"{target}: is there, and no run; name another folder with --out DIR")
    name = target.name if is_there else f".restore-{target.name}"
    staged = Run(target.parent, name)
    with console.signals(), staged.lock(console):
        counts = _Fetching(source, staged, console).all(is_there)
        if not is_there:
            files.sync_folder(staged.path)
            staged.release()
            if target.exists():
                files.remove(target)  # an empty folder
            files.move(staged.path, target)
            files.sync_folder(target.parent)
    return {"run": target.name, "folder": str(target), "from": source.address, **counts}


class _Fetching:
    """What fetches a run to a folder whose lock is held."""

    def __init__(self, source: Source, run: Run, console: Console) -> None:
        self._source, self._run, self._console = source, run, console
        self._counts = dict.fromkeys(("outputs", "files", "bytes"), 0)

    def all(self, is_there: bool) -> dict[str, int]:
        """Fetch what is not there; counts of that. is_there: it is a run, which may be another one."""
        roll_forward(self._run)
        held = self._source.held
        begun = self._run.path / "run.json"
        if is_there and begun.exists() and self._source.note("run.json") != begun.read_bytes():
            raise InputError(self._refusal(begun))
        manifests = self._source.manifests()
        if not is_there:  # of an earlier try, and since then removed from the mirror
            for place in committed(self._run):
                if place not in manifests:
                    files.remove(self._run.folder(*place))
        missing = [place for place, found in manifests.items() if not self._has(place, found, is_there)]
        with self._console.progress("restore", len(missing), "outputs") as advance:
            for place in missing:
                self._console.stop_requested()
                self._output(place, *manifests[place])
                advance(1)
        for name, key in held.sources.items():
            self._kept_source(name, key)
        for name in sorted(held.notes, key=lambda name: name == "run.json"):  # which makes it a run, last
            if not (self._run.path / name).exists():
                self._source.write(name, self._run.path / name)
        if not is_there:
            read_sealed(self._run.path / "run.json")
        return self._counts

    def _has(self, place: Place, manifest: tuple[Manifest, bytes], is_there: bool) -> bool:
        """Whether an output is there, and whole. Raises InputError (exit 4) for another one in a run."""
        path = self._run.folder(*place) / MANIFEST
        if not path.exists():
            return False
        if path.read_bytes() != manifest[1]:
            if is_there:
                raise InputError(self._refusal(path))
            files.remove(path.parent)  # of an earlier try, and since then replaced in the mirror
            return False
        for record in manifest[0].files:
            self._run.verify(record, self._run.path_of(record, *place))
        return True

    def _output(self, place: Place, manifest: Manifest, content: bytes) -> None:
        """Fetch an output to where unfinished ones are, and commit it."""
        folder = self._run.staging_root(place[1]) / f"{place[0]}-{manifest.fingerprint[:16]}"
        write_output(self._source, place, manifest, content, folder)
        roll_forward(self._run)
        self._counts["outputs"] += 1
        self._counts["files"] += len(manifest.files)
        self._counts["bytes"] += sum(record.bytes for record in manifest.files)

    def _kept_source(self, name: str, key: str) -> None:
        path = self._run.path / SOURCES / name
        if not path.exists():
            files.make_folder(path.parent)
            self._source.write(key, path)
            try:
                check_source(name[:64], path)
            except CorruptError as error:
                files.remove_file(path)
                raise CorruptError(f"{self._source.address}/{key}: {error}") from None
            files.sync_folder(path.parent)

    def _refusal(self, path: Path) -> str:
        way = "nothing was written; --out DIR restores it elsewhere"
        return f"{path}: is not the one in {self._source.address}; {way}"


def write_output(
    source: Source, place: Place, manifest: Manifest, content: bytes, folder: Path, with_files: bool = True
) -> None:
    """Fetch an output to `folder`, its manifest last; a file that is there already is kept."""
    base = layout.files_folder(place, manifest.fingerprint)
    parts = {folder, *(folder / record.part for record in manifest.files)}
    for part in sorted(parts):
        files.make_folder(part)

    def fetch(record: FileRecord) -> None:
        path = folder / record.part / record.name
        if not _is_whole(record, path):
            source.write(layout.file_key(base, record), path, record)

    together(fetch, manifest.files if with_files else [])
    if f"{base}/{TIMINGS}" in source.held.folders.get(place, {}).get(manifest.fingerprint[:16], ()):
        source.write(f"{base}/{TIMINGS}", folder / TIMINGS)
    for part in sorted(parts):
        files.sync_folder(part)
    files.write_file(folder / MANIFEST, content)
    files.sync_folder(folder)


def together(call: Callable[[_Given], _Found], items: Sequence[_Given]) -> list[_Found]:
    """What a call gives of each item, in order, several at a time: one request after the other waits most."""
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="mirror") as pool:
        return list(pool.map(call, items))


def _is_whole(record: FileRecord, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes and files.sha256_of(path) == record.sha256
