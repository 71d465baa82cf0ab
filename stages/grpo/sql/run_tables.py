"""run_tables: the tables of runs as Arrow data sets, each opened when a query scans it.

A query costs what it looks at: binding one needs the schema of each table, and only a scan reads manifests
and files. File lists come from manifests. Exact schemas are compared here, since a data set casts columns of
another type and fills missing ones with null.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from grpo import tables
from grpo.artifacts import (
    EVALUATION,
    OUTPUTS,
    RUN_OUTPUTS,
    TABLES_OF,
    ActiveRun,
    FileRecord,
    Manifest,
    Run,
    files,
)
from grpo.artifacts.manifest import check_size
from grpo.config.evaluate import PASS_THRESHOLD
from grpo.errors import CorruptError, GrpoError

_TIMINGS = pa.schema(
    [("iteration", pa.int32()), ("stage", pa.string()), ("part", pa.string()), ("seconds", pa.float64())]
)
# What an evaluation counted as a pass, and whether `eval_prompts` are still those it was made with.
SETTINGS = pa.schema(
    [
        ("iteration", pa.int32()),
        ("pass_reward", pa.string()),
        ("pass_threshold", pa.float64()),
        ("same_prompts", pa.bool_()),
    ]
)
# What counts as a pass in training: what would count in an evaluation, as configured now.
_PASS_SETTINGS = pa.schema([("pass_reward", pa.string()), ("pass_threshold", pa.float64())])
_TEXTS = ("ids", "inputs", "config", "user_files", "summary", "versions")
_MANIFESTS = pa.schema(
    [
        ("iteration", pa.int32()),
        ("stage", pa.string()),
        ("output", pa.string()),
        ("attempt", pa.int32()),
        ("fingerprint", pa.string()),
        ("rows", pa.int64()),
        *((name, pa.string()) for name in _TEXTS),
    ]
)
_FIXED = {
    "timings": _TIMINGS,
    "manifests": _MANIFESTS,
    "_eval_settings": SETTINGS,
    "_pass_settings": _PASS_SETTINGS,
}
NAMES = (*tables.TABLES, *_FIXED)
_PARQUET, _DISK = pa.dataset.ParquetFileFormat(), pa.fs.LocalFileSystem()


class LazyTable(pa.dataset.InMemoryDataset):  # type: ignore[misc]
    """A data set that knows its schema, and asks for its rows when it is scanned."""

    def __init__(self, schema: pa.Schema, open_data: Callable[[], pa.dataset.Dataset]) -> None:
        super().__init__(schema.empty_table())
        self._open_data = open_data

    def scanner(self, **options: Any) -> pa.dataset.Scanner:
        """A scanner of the rows; what DuckDB asks for."""
        return self._open_data().scanner(**options)


class RunTables:
    """What runs hold in some iterations, read piece by piece as queries ask for it.

    iteration: one, some, or None for those that are there now. outputs: the tables of others are empty.
    repeatable: so are timings and manifests, which tell equal runs apart.
    """

    def __init__(
        self,
        runs: list[ActiveRun],
        iteration: int | range | None,
        outputs: Collection[str] = tuple(OUTPUTS),
        repeatable: bool = False,
    ) -> None:
        self.runs = runs
        self.failure: BaseException | None = None
        """What went wrong as a table was opened: DuckDB passes on no more than its text."""
        self.outputs = outputs
        self.repeatable = repeatable
        self.turn_to(iteration)

    def turn_to(self, iteration: int | range | None) -> None:
        """Show what the runs hold of `iteration` now, instead of what was shown."""
        self._numbers = {run.name: _numbers(run, iteration) for run in self.runs}
        self._read: dict[tuple[ActiveRun, str, int | None], str | None] = {}
        self._opened: dict[tuple[ActiveRun, str], pa.dataset.Dataset] = {}
        self._files: list[tuple[FileRecord, Path]] = []

    def table(self, run: ActiveRun, name: str) -> LazyTable:
        """One of NAMES. Raises CorruptError where it is `prompts` and its first file cannot be read."""
        return LazyTable(self._schema(run, name), lambda: self._open(run, name))

    def are_current(self) -> bool:
        """Whether all outputs that were looked at are what they were: then nothing was read half old."""
        return all(_fingerprint(*place) == found for place, found in self._read.items())

    def check_content(self) -> None:
        """Raise CorruptError (exit 6) for a file that a query opened and whose content has changed."""
        for file, path in self._files:
            if files.sha256_of(path) != file.sha256:
                raise CorruptError(f"{path}: content changed since it was committed (sha256 differs)")

    def _open(self, run: ActiveRun, name: str) -> pa.dataset.Dataset:
        try:
            if (run, name) not in self._opened:
                self._opened[run, name] = self._data(run, name)
        except (GrpoError, OSError, KeyboardInterrupt) as error:
            self.failure = error
            raise
        return self._opened[run, name]

    def _data(self, run: ActiveRun, name: str) -> pa.dataset.Dataset:
        if name not in _FIXED:
            return self._dataset(run, name)
        return pa.dataset.dataset(pa.Table.from_pylist(list(self._rows(run, name)), schema=_FIXED[name]))

    def _rows(self, run: ActiveRun, name: str) -> Iterator[dict[str, Any]]:
        if name == "_pass_settings":
            return _pass_settings(run)
        if name == "_eval_settings":
            return _settings(run, self._manifests(run, (EVALUATION,)))
        shown = () if self.repeatable else self._manifests(run, (*RUN_OUTPUTS, *OUTPUTS))
        return _timings(run, shown) if name == "timings" else _manifests(run, shown)

    def _dataset(self, run: ActiveRun, table: str) -> pa.dataset.Dataset:
        """The files of one table, each of its recorded size and the exact schema."""
        schema = self._schema(run, table)
        found = list(self._table_files(run, table))
        fragments = [_fragment(table, file, path, schema) for file, path in found]
        self._files += found
        return pa.dataset.FileSystemDataset(fragments, schema, _PARQUET, _DISK)

    def _schema(self, run: ActiveRun, name: str) -> pa.Schema:
        if name in _FIXED:
            return _FIXED[name]
        first = next(self._table_files(run, name), None) if name in tables.WITH_OWN_COLUMNS else None
        return tables.schema(name) if first is None else _fragment(name, *first).physical_schema

    def _table_files(self, run: ActiveRun, table: str) -> Iterator[tuple[FileRecord, Path]]:
        output = next((output for output, held in TABLES_OF.items() if table in held), table)
        for _, manifest in self._manifests(run, (output,)):
            for file in manifest.files:
                if file.table == table:
                    yield file, run.path_of(file, output, manifest.iteration)

    def _manifests(self, run: ActiveRun, outputs: Collection[str]) -> Iterator[tuple[str, Manifest]]:
        """Those of `outputs` that are committed and shown, earliest first."""
        places: list[tuple[str, int | None]] = [(output, None) for output in RUN_OUTPUTS if output in outputs]
        shown = [output for output in self.outputs if output in outputs]
        places += [(output, number) for number in self._numbers[run.name] for output in shown]
        for output, number in places:
            manifest = run.manifest(output, number)
            self._read[run, output, number] = manifest.fingerprint if manifest else None
            if manifest is not None:
                yield output, manifest


def _numbers(run: Run, iteration: int | range | None) -> list[int] | range:
    if iteration is None:
        return sorted({*run.iterations(), *run.evaluations()})
    return [iteration] if isinstance(iteration, int) else iteration


def _fingerprint(run: Run, output: str, number: int | None) -> str | None:
    manifest = run.manifest(output, number)
    return manifest.fingerprint if manifest else None


def _fragment(table: str, file: FileRecord, path: Path, schema: pa.Schema | None = None) -> Any:
    """One file of a data set. Raises CorruptError for one of another size or schema."""
    check_size(file, path)
    fragment = _PARQUET.make_fragment(str(path), _DISK)
    try:
        found = fragment.physical_schema  # its footer is kept for the scan
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptError(f"{path}: cannot be read as Parquet: {error}") from None
    tables.check_schema(table, found, path)
    if schema is not None and not found.equals(schema):  # the user's columns of two files of prompts
        raise CorruptError(f"{path}: its columns are not those of the file before it")
    return fragment


def _settings(run: Run, outputs: Iterable[tuple[str, Manifest]]) -> Iterator[dict[str, Any]]:
    prompts = run.id_of("eval_prompts")
    for _, manifest in outputs:
        yield {
            "iteration": manifest.iteration,
            **{name: manifest.config["evaluate"][name] for name in ("pass_reward", "pass_threshold")},
            "same_prompts": manifest.user_files["evaluate.prompts"] == prompts,
        }


def _pass_settings(run: ActiveRun) -> Iterator[dict[str, Any]]:
    evaluate, first = run.config.evaluate, run.config.score.rewards[0].name
    reward = (evaluate.pass_reward if evaluate else None) or first
    yield {"pass_reward": reward, "pass_threshold": evaluate.pass_threshold if evaluate else PASS_THRESHOLD}


def _timings(run: Run, outputs: Iterable[tuple[str, Manifest]]) -> Iterator[dict[str, Any]]:
    for output, manifest in outputs:
        place = {"iteration": manifest.iteration, "stage": manifest.stage}
        for part, seconds in run.timings(output, manifest.iteration).items():
            yield {**place, "part": part, "seconds": seconds}


def _manifests(run: Run, outputs: Iterable[tuple[str, Manifest]]) -> Iterator[dict[str, Any]]:
    for output, manifest in outputs:
        scalars = {name: getattr(manifest, name) for name in ("iteration", "stage", "attempt", "fingerprint")}
        texts = {name: json.dumps(getattr(manifest, name)) for name in _TEXTS}
        yield {**scalars, **texts, "output": output, "rows": manifest.rows}
