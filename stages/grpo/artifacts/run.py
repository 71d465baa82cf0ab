"""artifacts.run: one run on disk. Where everything is, and how it is read.

Readers take no lock and trust only manifests: file lists come from them, sizes are checked when a file is
opened and its sha256 when a stage reads it.
"""

import gc
import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from grpo import tables
from grpo.artifacts import files
from grpo.artifacts.layout import (
    EVALUATION,
    OUTPUTS,
    TABLES_OF,
    holder_of,
    iteration_folder,
    iterations_in,
)
from grpo.artifacts.lease import Lease
from grpo.artifacts.lock import lock
from grpo.artifacts.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    changed,
    check_size,
    read_json,
    read_manifest,
)
from grpo.console import Console, printable
from grpo.errors import CorruptError, GrpoError, InputError, ResourceError

TIMINGS = "timings.json"
_Found = TypeVar("_Found")
_LONGEST_S = 1e10  # 300 years
_LOOKS, _PAUSE_S = 100, 0.005  # at an output that is being replaced


class Mirror(Protocol):
    """What copies a run elsewhere, beside the work on it."""

    def committed(self, output: str, iteration: int | None) -> None:
        """Copy an output that has just been committed. Called from any thread; raises nothing."""

    def check(self) -> None:
        """Raise what failed meanwhile."""


class Run:
    """A run on disk: its folder, outputs, tables and their integrity. The work on it is in active.py."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.path = root / name  # the folder is the run, whatever name it had where it was made
        self.name = printable(name)
        self.made: set[str] = (
            set()
        )  # fingerprints of outputs that this process committed: no need to ask twice
        self.mirror: Mirror | None = None
        self._lease: Lease | None = None
        self._verified: set[tuple[Path, str]] = set()
        self._seen: dict[Hashable, Any] | None = None

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Look at each manifest once in a `with` block, at whatever else goes through once() too.

        For a look over all iterations, in which nothing is committed.
        """
        if self._seen is not None:
            yield
            return
        self._seen, collecting = {}, gc.isenabled()
        gc.disable()  # all that is read is kept to the end: walking it again and again doubles the time
        try:
            yield
        finally:
            self._seen = None
            if collecting:
                gc.enable()

    def once(self, key: Hashable, look: Callable[[], _Found]) -> _Found:
        """What `look` finds: within steady(), what it found the first time."""
        if self._seen is None:
            return look()
        if key not in self._seen:
            self._seen[key] = look()
        found: _Found = self._seen[key]
        return found

    def folder(self, output: str, iteration: int | None) -> Path:
        """Where an output is committed; `iteration` None for `prompts` and `policy`."""
        if iteration is None:
            return self.path / output
        return self.path.joinpath(iteration_folder(iteration), output)

    def iteration_root(self, iteration: int | None) -> Path:
        """Where the outputs of an iteration are; None: of the run as a whole."""
        return self.path if iteration is None else self.path / iteration_folder(iteration)

    def staging_root(self, iteration: int | None) -> Path:
        """Where unfinished outputs of an iteration are."""
        base = self.path / ".staging"
        return base if iteration is None else base / iteration_folder(iteration)

    @property
    def trash(self) -> Path:
        """Where replaced outputs go."""
        return self.path / ".trash"

    def manifest(self, output: str, iteration: int | None) -> Manifest | None:
        """The manifest of a committed output, or None. Raises CorruptError (exit 6) for that of another.

        A writer that replaces the output moves the old one away and the new one in: a reader waits for that.
        """
        return self.once((output, iteration), lambda: self._manifest(output, iteration))

    def _manifest(self, output: str, iteration: int | None) -> Manifest | None:
        folder = self.folder(output, iteration)
        for _ in range(_LOOKS):
            found = read_manifest(folder)
            if found is not None or not self.is_staged(output, iteration):
                break
            time.sleep(_PAUSE_S)
        # It may have come between the two looks; and what a crash left staged, the next writer moves in.
        found = found or read_manifest(folder)
        if found and (found.stage, found.iteration) != (OUTPUTS.get(output, output), iteration):
            where = "" if found.iteration is None else f" of iteration {found.iteration}"
            raise CorruptError(f"{folder}: holds what {found.stage}{where} made")
        return found

    def is_staged(self, output: str, iteration: int | None) -> bool:
        """Whether an output is complete but for being moved to its place."""
        return any(self.staging_root(iteration).glob(f"{output}-*/{MANIFEST}"))

    def require(self, output: str, iteration: int | None, command: str) -> Manifest:
        """The manifest of a committed output; InputError (exit 4) naming `command` when it is missing."""
        manifest = self.manifest(output, iteration)
        if manifest is None:
            raise InputError(f"{self.folder(output, iteration)}: missing; run `{command}` first")
        return manifest

    def iterations(self) -> list[int]:
        """Iterations that hold anything but an evaluation, in order: the last policy has nothing else."""
        measured = set(self.evaluations())
        return [
            number
            for number in iterations_in(self.path)
            if number not in measured
            or any(path.name != EVALUATION for path in self.iteration_root(number).iterdir())
        ]

    def evaluations(self) -> list[int]:
        """Policies that were measured, in order."""
        return [number for number in iterations_in(self.path) if self.folder(EVALUATION, number).exists()]

    def id_of(self, reference: str) -> str | None:
        """Present id of `name@iteration` or `name`, or None when it is not there. Example: policy@3."""
        name, _, _ = reference.partition("@")
        manifest = self.manifest(*holder_of(reference))
        return manifest.ids.get(name) if manifest else None

    def timings(self, output: str, iteration: int | None) -> dict[str, float]:
        """Seconds by part of a committed output; empty where none were written."""
        path = self.folder(output, iteration) / TIMINGS
        try:
            seconds: dict[str, float] = read_json(path, seconds=dict)["seconds"]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        for part, value in seconds.items():
            if not isinstance(value, int | float) or not 0 <= value < _LONGEST_S:  # NaN is not
                raise CorruptError(f"{path}: the seconds of {part} are no number from 0 to {_LONGEST_S:.0e}")
        return seconds

    def period(self, output: str, iteration: int | None) -> dict[str, float | None]:
        """When a committed output was `started` first and `ended`, Unix seconds; None where not written."""
        path = self.folder(output, iteration) / TIMINGS
        found = read_json(path) if path.is_file() else {}
        times = {name: found.get(name) for name in ("started", "ended")}
        if not all(isinstance(at, int | float) and 0 < at < _LONGEST_S for at in times.values() if at):
            raise CorruptError(f"{path}: started and ended must be Unix times")
        return times

    def path_of(self, file: FileRecord, output: str, iteration: int | None) -> Path:
        """Where a file of an output is."""
        return self.folder(output, iteration) / file.part / file.name

    def weight_check_path(self, iteration: int) -> Path:
        """The weight check of policy `iteration`, verified: log-probs that whoever loads it must come to."""
        output, before = holder_of(f"policy@{iteration}")
        manifest = self.require(output, before, "grpo run")
        file = next((file for file in manifest.files if file.name == "weight_check.json"), None)
        if file is None:
            place = self.folder(output, before)
            raise InputError(f"{place}: has no weight_check.json; make a new `run:`")
        path = self.path_of(file, output, before)
        self.verify(file, path)
        return path

    def verify(self, file: FileRecord, path: Path) -> None:
        """Raise CorruptError (exit 6) unless `path` has the recorded size and sha256.

        A file that this process has written or verified is not hashed again.
        """
        check_size(file, path)
        if (path, file.sha256) in self._verified:
            return
        if files.sha256_of(path) != file.sha256:
            raise changed(path)
        self.trust(file, path)

    def trust(self, file: FileRecord, path: Path) -> None:
        """Note that this process has just written `path` or checked it."""
        self._verified.add((path, file.sha256))

    def read(self, table: str, iteration: int | None, columns: list[str] | None = None) -> pa.Table:
        """All rows of a committed table in key order, verified. Raises InputError when it is missing."""
        return tables.decode(table, self._contents(table, iteration), columns)

    def _contents(self, table: str, iteration: int | None) -> Iterator[tuple[Path, bytes]]:
        output = next((output for output, held in TABLES_OF.items() if table in held), table)
        manifest = self.manifest(output, iteration)
        if manifest is None:
            raise InputError(f"{self.folder(output, iteration)}: missing")
        for file in manifest.files:
            if file.table == table:
                path = self.path_of(file, output, manifest.iteration)
                self.verify(file, path)
                yield path, path.read_bytes()

    def links(self) -> list[Path]:
        """Links that stand where a file or folder of the run belongs, wherever they lead; itself included.

        What is in .trash is only ever removed, and a link there goes without what it leads to.
        """
        found = [
            Path(entry.path) for entry in files.entries_below(self.path, self.trash) if entry.is_symlink()
        ]
        return [path for path in (self.path, *found) if path.is_symlink()]

    def refuse_links(self, files_too: bool = False) -> None:
        """Raise CorruptError (exit 6) for a folder, or a file too, that is a link: it is outside the run."""
        for path in self.links():
            # One that leads nowhere stands where a folder may be wanted.
            if files_too or path.is_dir() or not path.exists():
                way = "remove it" if path.name == ".lock" else "`grpo verify --discard` removes it"
                if path == self.path:
                    way = "name that folder by its path"
                kind = "another folder" if path.is_dir() else "another file"
                to = f"{kind} ({os.path.realpath(path)})" if path.exists() else "nowhere"
                raise CorruptError(f"{path}: is a link to {to}, not the run's own; {way}")

    @contextmanager
    def lock(self, console: Console, linked: bool = False) -> Iterator[None]:
        """Hold the run for writing; LockedError (exit 5) when another process does.

        Raises CorruptError (exit 6) as refuse_links(), but for links that are asked for to be removed.
        """
        files.make_folder(self.path)
        if not linked or self.path.is_symlink():
            self.refuse_links()
        with lock(self.path, console.say, console.stop_requested) as self._lease:
            try:
                yield
            except (GrpoError, OSError):
                # Whoever takes over clears away what is half written: that a file is gone says nothing then.
                with suppress(CorruptError, ResourceError):
                    self.check_held()
                raise
            finally:
                self._lease = None

    @property
    def is_held(self) -> bool:
        """Whether this process holds it for writing."""
        return self._lease is not None

    def check_held(self) -> None:
        """Before anything is committed: LockedError (exit 5) where another machine has taken the run over."""
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Let go of the lease, not of the lock: for a folder that goes, or gets its name."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
