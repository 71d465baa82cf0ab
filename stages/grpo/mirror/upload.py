"""upload: what is committed in a run -> its mirror. Files first, then the manifest that counts them.

Nothing here is written over while a manifest counts it; whatever is cut off is done by the next command.
"""

from collections.abc import Collection, Iterator
from hashlib import md5, sha256
from pathlib import Path

from grpo.artifacts import (
    CHECKPOINT,
    MANIFEST,
    OUTPUTS,
    RUN_OUTPUTS,
    TIMINGS,
    FileRecord,
    Manifest,
    Run,
    check_recorded,
    iterations_in,
    kept_sources,
)
from grpo.artifacts.layout import holder_of
from grpo.artifacts.lease import Lease
from grpo.errors import CorruptError, InputError, LockedError, unreadable
from grpo.mirror import layout
from grpo.mirror.layout import NOTES, Holdings, Place
from grpo.mirror.store import Store

_PIECE_BYTES = 2**22


class Upload:
    """Copies a run to the folder of its name in a store, while its lease is held."""

    def __init__(self, run: Run, store: Store, lease: Lease) -> None:
        self._run, self._store, self._lease = run, store, lease
        self._folder = run.path.name
        self.held: Holdings = layout.holdings(store.listing(self._folder), self._folder)

    def behind(self) -> list[Place]:
        """Outputs whose manifest here is not the one there, in order."""
        return [place for place in committed(self._run) if not self._is_same(place)]

    def require_own(self, damaged: Collection[Place] = ()) -> None:
        """Raise InputError (exit 4) where the mirror holds what this run does not: it is of another one."""
        for place in layout.in_order(self.held.manifests):
            if place not in damaged and not self._is_same(place):
                where = f"{self._store.address}/{self._folder}"
                raise InputError(
                    f"{where}: holds other {layout.text_of(place)} than this run, written from elsewhere;"
                    f" `grpo restore {where} --out DIR` fetches that, another `artifacts.mirror` or `run:`"
                    " keeps this one"
                )

    def forget(self, places: Collection[Place]) -> None:
        """Have no manifest count the copies of these: they are due again."""
        for place in self.held.manifests.keys() & set(places):
            self._lease.check()
            self._delete(layout.manifest_key(place))
            del self.held.manifests[place]

    def copy(self, place: Place) -> None:
        """Copy an output, unless its copy is there; where it was replaced meanwhile, the new one is due too.

        Raises CorruptError (exit 6) for a file that is not what was committed, LockedError (exit 5) where
        another command writes this mirror.
        """
        folder = self._run.folder(*place)
        try:
            content = (folder / MANIFEST).read_bytes()
            if self._is_same(place, content):
                return
            self._copy_notes()
            manifest = layout.parsed(place, folder / MANIFEST, content)
            self._make_room(place, manifest)
            self._copy_files(place, manifest, folder)
        except FileNotFoundError:
            if (folder / MANIFEST).exists() and (folder / MANIFEST).read_bytes() == content:
                raise CorruptError(f"{folder}: a file is gone; `grpo verify` says which") from None
            return  # dropped or replaced meanwhile, which is a commit of its own
        self._commit(place, content)
        self._remove_old(place, manifest.fingerprint)

    def drop_checkpoints(self) -> None:
        """Remove copies of checkpoints that the run keeps no longer."""
        for place in [*self.held.manifests]:
            if place[0] == CHECKPOINT and not (self._run.folder(*place) / MANIFEST).exists():
                self._remove(place)

    def finish(self, removed_too: bool) -> None:
        """Copy what is behind, and remove what nothing refers to. removed_too: outputs gone here, too.

        An output that others were made from stays: it was lost here, not removed.
        """
        self._copy_notes()
        for place in self.behind():
            self.copy(place)
        self.drop_checkpoints()
        here = committed(self._run)
        gone = self.held.manifests.keys() - set(here) if removed_too else set()
        read = self._read_by(here) if gone else set()
        for place in gone - read:
            self._remove(place)
        for place in [*self.held.folders]:
            if place not in self.held.manifests:
                self._remove_old(place, "")
            elif len(self.held.folders[place]) > 1 and (manifest := self._run.manifest(*place)):
                self._remove_old(place, manifest.fingerprint)

    def _read_by(self, places: Collection[Place]) -> set[Place]:
        """What outputs were made from."""
        manifests = filter(None, (self._run.manifest(*place) for place in places))
        return {holder_of(reference) for manifest in manifests for reference in manifest.inputs}

    def _is_same(self, place: Place, content: bytes | None = None) -> bool:
        """Whether the manifest there is the one here. Its etag tells, but for stores that encrypt."""
        etag, path = self.held.manifests.get(place), self._run.folder(*place) / MANIFEST
        if etag is None or (content is None and not path.exists()):
            return False
        own = path.read_bytes() if content is None else content
        if etag.strip('"') == md5(own, usedforsecurity=False).hexdigest():
            return True
        found = self._store.get(self._key(layout.manifest_key(place)))
        return found is not None and found == (own, etag)

    def _copy_notes(self) -> None:
        """Copy what is beside the outputs, where it is not there as it is now."""
        self._lease.check_renewed()
        for name in NOTES:
            content = _content(self._run.path / name)
            digest = "" if content is None else md5(content, usedforsecurity=False).hexdigest()
            if content is None and name in self.held.notes:
                self._delete(name)
                del self.held.notes[name]
            elif content is not None and self.held.notes.get(name, "").strip('"') != digest:
                self._store.put(self._key(name), [content], len(content))
                self.held.notes[name] = digest
        for digest, path in kept_sources(self._run).items():
            if path.name in self.held.sources or path.name.endswith(".tmp"):  # it is being written
                continue
            content, key = _content(path), layout.source_key(path.name)
            if content is not None and sha256(content).hexdigest() == digest:
                self._store.put(self._key(key), [content], len(content))
                self.held.sources[path.name] = key

    def _make_room(self, place: Place, manifest: Manifest) -> None:
        """Have no manifest count files of the same fingerprint: no file changes under one."""
        digits = manifest.fingerprint[:16]
        if place in self.held.manifests and digits in self.held.folders.get(place, {}):
            self._lease.check()
            self._delete(layout.manifest_key(place))
            del self.held.manifests[place]

    def _copy_files(self, place: Place, manifest: Manifest, folder: Path) -> None:
        base = layout.files_folder(place, manifest.fingerprint)
        keys = self.held.folders.setdefault(place, {}).setdefault(manifest.fingerprint[:16], [])
        for record in manifest.files:
            self._lease.check_renewed()
            key = layout.file_key(base, record)
            path = folder / record.part / record.name
            self._store.put(self._key(key), checked(record, path), record.bytes)
            keys.append(key)
        if (folder / TIMINGS).exists():
            content, key = (folder / TIMINGS).read_bytes(), f"{base}/{TIMINGS}"
            self._store.put(self._key(key), [content], len(content))
            keys.append(key)

    def _commit(self, place: Place, content: bytes) -> None:
        """Write the manifest, unless another command has written this one or the lease."""
        self._lease.check()
        key, before = self._key(layout.manifest_key(place)), self.held.manifests.get(place)
        if before is None:
            etag = self._store.create(key, content)
        else:
            etag = self._store.replace(key, content, before)
        if etag is None:
            found = self._store.get(key)
            if found is None or found[0] != content:  # else the answer to what was written was lost
                raise LockedError(
                    f"{self._store.address}/{key}: written by another command; mirroring stopped, and what is"
                    " committed here stays"
                )
            etag = found[1]
        self.held.manifests[place] = etag

    def _remove(self, place: Place) -> None:
        """Remove the copy of an output: its manifest first, so that half of one is never taken for one."""
        self._lease.check()
        self._delete(layout.manifest_key(place))
        del self.held.manifests[place]
        self._remove_old(place, "")

    def _remove_old(self, place: Place, fingerprint: str) -> None:
        """Remove files of other attempts at an output than the one that its manifest counts."""
        attempts = self.held.folders.get(place, {})
        for digits in [digits for digits in attempts if digits != fingerprint[:16]]:
            self._lease.check_renewed()
            for key in dict.fromkeys(attempts.pop(digits)):
                self._delete(key)
        if not attempts:
            self.held.folders.pop(place, None)

    def _delete(self, key: str) -> None:
        self._store.delete(self._key(key))

    def _key(self, key: str) -> str:
        return f"{self._folder}/{key}"


def committed(run: Run) -> list[Place]:
    """Outputs that are committed in a run, in order."""
    places: list[Place] = [(output, None) for output in RUN_OUTPUTS]
    places += [(output, n) for n in iterations_in(run.path) for output in (*OUTPUTS, CHECKPOINT)]
    return layout.in_order(place for place in places if (run.folder(*place) / MANIFEST).exists())


def _content(path: Path) -> bytes | None:
    """Of a small file; None: there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def checked(record: FileRecord, path: Path) -> Iterator[bytes]:
    """The content of a file in pieces. CorruptError (exit 6) at its end where it is not as recorded."""
    digest, num_bytes = sha256(), 0
    for piece in _pieces(path):
        digest.update(piece)
        num_bytes += len(piece)
        yield piece
    check_recorded(record, (num_bytes, digest.hexdigest()), path)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except FileNotFoundError:  # dropped or replaced meanwhile
        raise
    except OSError as error:  # whoever writes to the store would take it for one of the store
        raise unreadable(path, error) from None
