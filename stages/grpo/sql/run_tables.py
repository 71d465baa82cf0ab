"""run_tables: the tables of runs as Arrow data sets, each opened when a query scans it.

A query costs what it looks at: binding one needs the schema of each table, and only a scan reads manifests
and files.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from grpo import tables
from grpo.artifacts import EVALUATION, OUTPUTS, RUN_OUTPUTS, TABLES_OF, FileRecord, Manifest, Run, files
from grpo.artifacts.manifest import changed, check_size, read_sealed
from grpo.config.evaluate import PASS_THRESHOLD
from grpo.errors import CorruptError, GrpoError, unreadable

# What an evaluation counted as a pass, and whether `eval_prompts` are still those it was made with.
SETTINGS = pa.schema(
    {"iteration": "int32", "pass_reward": "string", "pass_threshold": "float64", "same_prompts": "bool"}
)
_TEXTS = dict.fromkeys(("ids", "inputs", "config", "user_files", "summary", "versions"), "string")
_PLACE = {"iteration": "int32", "stage": "string"}
_PERIOD = {"started": "float64", "ended": "float64"}
_FIXED = {
    "timings": pa.schema({**_PLACE, "part": "string", "seconds": "float64", **_PERIOD}),
    "manifests": pa.schema(
        {**_PLACE, "output": "string", "attempt": "int32", "fingerprint": "string", "rows": "int64", **_TEXTS}
    ),
    "_eval_settings": SETTINGS,
    # What counts as a pass in training: what counted in the evaluation nearest before.
    "_pass_settings": pa.schema({"iteration": "int32", "pass_reward": "string", "pass_threshold": "float64"}),
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
        runs: Sequence[Run],
        iteration: int | range | None,
        outputs: Collection[str] = tuple(OUTPUTS),
        repeatable: bool = False,
    ) -> None:
        self.runs = runs
        self.failure: BaseException | None = None
        """What went wrong as a table was opened: DuckDB passes on no more than its text."""
        self.outputs = outputs
        self.repeatable = repeatable
        self.show_iteration(iteration)

    def show_iteration(self, iteration: int | range | None) -> None:
        """Show what the runs hold of `iteration` now, instead of what was shown."""
        wanted = [iteration] if isinstance(iteration, int) else iteration
        self._numbers = {
            run: sorted({*run.iterations(), *run.evaluations()}) if wanted is None else wanted
            for run in self.runs
        }
        self._read: dict[tuple[Run, str, int | None], Manifest | None] = {}
        self._opened: dict[tuple[Run, str], pa.dataset.Dataset] = {}
        self._files: list[tuple[FileRecord, Path]] = []

    def table(self, run: Run, name: str) -> LazyTable:
        """One of NAMES. Raises CorruptError where it is `prompts` and its first file cannot be read."""
        return LazyTable(self._schema(run, name), lambda: self._open(run, name))

    def are_current(self) -> bool:
        """Whether all outputs that were looked at are what they were: then nothing was read half old."""
        return all(run.manifest(output, at) == found for (run, output, at), found in self._read.items())

    def check_content(self) -> None:
        """Raise CorruptError (exit 6) for a file that a query opened and whose content has changed."""
        for file, path in self._files:
            if files.sha256_of(path) != file.sha256:
                raise changed(path)

    def _schema(self, run: Run, name: str) -> pa.Schema:
        if name in _FIXED:
            return _FIXED[name]
        first = next(self._table_files(run, name), None) if name in tables.WITH_OWN_COLUMNS else None
        return tables.schema(name) if first is None else _fragment(name, *first).physical_schema

    def _open(self, run: Run, name: str) -> pa.dataset.Dataset:
        try:
            if (run, name) not in self._opened:
                self._opened[run, name] = self._dataset(run, name)
        except (GrpoError, OSError, KeyboardInterrupt) as error:
            self.failure = error
            raise
        return self._opened[run, name]

    def _dataset(self, run: Run, name: str) -> pa.dataset.Dataset:
        schema = self._schema(run, name)
        if name in _FIXED:
            return pa.dataset.dataset(pa.Table.from_pylist(self._rows(run, name), schema))
        found = list(self._table_files(run, name))
        fragments = [_fragment(name, file, path, schema) for file, path in found]
        self._files += found
        return pa.dataset.FileSystemDataset(fragments, schema, _PARQUET, _DISK)

    def _rows(self, run: Run, name: str) -> list[dict[str, Any]]:
        """Rows of one of _FIXED, with more keys than it has columns."""
        if name == "_pass_settings":
            return [_pass_settings(run, manifest) for _, manifest in self._manifests(run, ("rewards",))]
        if name == "_eval_settings":
            return [_settings(run, manifest) for _, manifest in self._manifests(run, (EVALUATION,))]
        every = () if self.repeatable else self._manifests(run, (*RUN_OUTPUTS, *OUTPUTS))
        if name == "manifests":
            return [{**dict(manifest), **_texts(manifest), "output": output} for output, manifest in every]
        return [
            {**dict(manifest), **period, "part": part, "seconds": seconds}
            for output, manifest in every
            for period in [run.period(output, manifest.iteration)]
            for part, seconds in run.timings(output, manifest.iteration).items()
        ]

    def _table_files(self, run: Run, table: str) -> Iterator[tuple[FileRecord, Path]]:
        output = next((output for output, held in TABLES_OF.items() if table in held), table)
        for _, manifest in self._manifests(run, (output,)):
            for file in manifest.files:
                if file.table == table:
                    yield file, run.path_of(file, output, manifest.iteration)

    def _manifests(self, run: Run, outputs: Collection[str]) -> Iterator[tuple[str, Manifest]]:
        """Those of `outputs` that are committed and shown, earliest first."""
        places: list[tuple[str, int | None]] = [(output, None) for output in RUN_OUTPUTS]
        places += [(output, number) for number in self._numbers[run] for output in self.outputs]
        for output, number in places:
            if output in outputs:
                manifest = self._read[run, output, number] = run.manifest(output, number)
                if manifest is not None:
                    yield output, manifest


def _fragment(table: str, file: FileRecord, path: Path, schema: pa.Schema | None = None) -> Any:
    """One file of a data set. Raises CorruptError for one of another size or schema.

    A data set casts columns of another type, and fills missing ones with null.
    """
    check_size(file, path)
    fragment = _PARQUET.make_fragment(str(path), _DISK)
    try:
        found = fragment.physical_schema  # its footer is kept for the scan
    except OSError as error:
        raise unreadable(path, error, " as Parquet") from None
    except pa.ArrowInvalid as error:
        raise CorruptError(f"{path}: cannot be read as Parquet: {error}") from None
    tables.check_schema(table, found, path)
    # The user's columns of two files of prompts.
    if schema is not None and table in tables.WITH_OWN_COLUMNS and not found.equals(schema):
        raise CorruptError(f"{path}: its columns are not those of the file before it")
    return fragment


def _settings(run: Run, manifest: Manifest) -> dict[str, Any]:
    same_prompts = manifest.user_files["evaluate.prompts"] == run.id_of("eval_prompts")
    return {**manifest.config["evaluate"], "iteration": manifest.iteration, "same_prompts": same_prompts}


def _pass_settings(run: Run, rewards: Manifest) -> dict[str, Any]:
    """As the newest evaluation of a policy up to this one had them, else the first; else as the run began."""
    measured, created = run.evaluations(), _created(run)
    before = [policy for policy in measured if policy <= (rewards.iteration or 0)][-1:]
    manifest = run.manifest(EVALUATION, (before or measured)[0]) if measured else None
    evaluate = (manifest.config if manifest else created).get("evaluate") or {}
    names = [*rewards.summary.get("weights", ()), *(reward["name"] for reward in created["score"]["rewards"])]
    return {
        "iteration": rewards.iteration,
        "pass_reward": evaluate.get("pass_reward") or next(iter(names), None),  # None: teachers alone
        "pass_threshold": evaluate.get("pass_threshold", PASS_THRESHOLD),
    }


def _created(run: Run) -> dict[str, Any]:
    """The configuration that the run began with; nothing of it where run.json is not there."""
    path = run.path / "run.json"
    found: dict[str, Any] = read_sealed(path)["config"] if path.exists() else {"score": {"rewards": []}}
    return found


def _texts(manifest: Manifest) -> dict[str, str]:
    return {name: json.dumps(getattr(manifest, name)) for name in _TEXTS}
