"""sql: DuckDB over the tables of runs. Views only; nothing is stored, nothing can be written.

Files come from manifests and are registered as Arrow data sets; then the connection loses access to
everything else and its configuration is locked. Filtering statements would be no sandbox: a SELECT can write
files, so the connection itself cannot.
"""

import json
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from grpo import tables
from grpo.artifacts import EVALUATION, OUTPUTS, RUN_OUTPUTS, TABLES_OF, Manifest, Run
from grpo.artifacts.run import check_size
from grpo.config.evaluate import PASS_THRESHOLD
from grpo.errors import CorruptError, GrpoError, ResourceError, UsageError

VIEWS = (*tables.TABLES, "samples", "iterations", "eval_samples", "evals", "timings", "manifests")
MEMORY_GIB = 1.0
# Each a query in a file of its name, over views that come before it.
_DERIVED = ("samples", "eval_samples", "evals", "iterations")

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
_MANIFESTS = pa.schema(
    [
        ("iteration", pa.int32()),
        ("stage", pa.string()),
        ("output", pa.string()),
        ("attempt", pa.int32()),
        ("fingerprint", pa.string()),
        ("rows", pa.int64()),
        *((name, pa.string()) for name in ("ids", "inputs", "config", "user_files", "summary", "versions")),
    ]
)

Connection = duckdb.DuckDBPyConnection
_Result = TypeVar("_Result")


@contextmanager
def connect(
    runs: list[Run],
    iteration: int | range | None = None,
    outputs: Collection[str] = tuple(OUTPUTS),
    repeatable: bool = False,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A closed-off connection whose views are the tables of `runs`, or of one `iteration` or some of them.

    `outputs`: those of which tables are shown; the tables of the others are empty. repeatable: equal tables
    give equal rows in an equal order: one thread, and no timings or manifests, which tell equal runs apart.

    Raises CorruptError when a listed file is missing, has another size or another schema.
    """
    spill = tempfile.TemporaryDirectory(prefix="grpo-sql-")  # what does not fit into memory goes here
    connection = duckdb.connect(
        ":memory:",
        config={
            "temp_directory": spill.name,
            "memory_limit": f"{MEMORY_GIB}GiB",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
            "preserve_insertion_order": "false",
            **({"threads": 1} if repeatable else {}),
        },
    )
    try:
        connection.execute("set enable_progress_bar = false")
        found = {run.name: _outputs(run, iteration, outputs) for run in runs}
        for table in tables.TABLES:
            data = [(run.name, _dataset(run, table, found[run.name])) for run in runs]
            _create_view(connection, table, data)
        told = {run.name: [] if repeatable else found[run.name] for run in runs}
        _create_view(connection, "timings", [(run.name, _timings(run, told[run.name])) for run in runs])
        _create_view(connection, "manifests", [(run.name, _manifests(told[run.name])) for run in runs])
        settings = [(run.name, _settings(run, found[run.name])) for run in runs]
        _create_view(connection, "_eval_settings", settings)
        _create_view(connection, "_pass_settings", [(run.name, _pass_settings(run)) for run in runs])
        for view in _DERIVED:
            text = own_text(f"sql/views/{view}")
            connection.execute(f"create view {view} as {text}")
        for setting in ("enable_external_access = false", "lock_configuration = true"):
            connection.execute(f"set {setting}")
        yield connection
    finally:
        connection.close()
        spill.cleanup()


def query(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    parameters: dict[str, Any] | None = None,
    timeout_s: float | None = None,
) -> pa.Table:
    """The rows of one statement.

    Raises UsageError (exit 2) with DuckDB's message or for two statements, ResourceError (exit 7) over a
    limit.
    """
    timer = threading.Timer(timeout_s or 0, connection.interrupt)
    try:
        if timeout_s:
            timer.start()
        return _relation(connection, statement, parameters).to_arrow_table()
    except duckdb.Error as error:
        raise _explained(error, timeout_s) from None
    except RuntimeError as error:
        if "interrupt" not in str(error).lower():
            raise
        raise KeyboardInterrupt from None  # which is what it was before DuckDB made this of it
    finally:
        timer.cancel()


def _relation(
    connection: Connection, statement: str, parameters: dict[str, Any] | None = None
) -> duckdb.DuckDBPyRelation:
    """What one statement would give; of a select nothing is computed yet."""
    number = len(_statements(connection, statement))
    if number > 1:  # DuckDB would run each and give the rows of the last
        raise UsageError(f"query: {number} statements, divided by `;`; write one")
    relation = connection.sql(statement, params=parameters)
    if relation is None:  # an empty text, or a statement that gives no rows
        raise UsageError("query: gives no rows; write a select")
    return relation


def _statements(connection: Connection, text: str) -> list[duckdb.Statement]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"query: character {error.start} is a lone surrogate, no text; leave it out"
        ) from None
    return connection.extract_statements(text)


def read(
    runs: list[Run],
    statement: str,
    parameters: dict[str, Any] | None = None,
    iteration: int | None = None,
    timeout_s: float | None = None,
) -> pa.Table:
    """The rows of one statement over runs that may be worked on meanwhile; errors as of connect and query."""
    return consult(runs, lambda connection: query(connection, statement, parameters, timeout_s), iteration)


def consult(runs: list[Run], work: Callable[[Connection], _Result], iteration: int | None = None) -> _Result:
    """What `work` makes of several queries over one state of runs that may be worked on meanwhile.

    What was replaced while it was read is read again.
    """
    while True:
        before = _committed(runs)
        try:
            with connect(runs, iteration) as connection:
                return work(connection)
        except (GrpoError, OSError):
            if _committed(runs) == before:
                raise


def _committed(runs: list[Run]) -> list[str]:
    return [manifest.fingerprint for run in runs for _, manifest in _outputs(run, None, OUTPUTS)]


def create_view(connection: duckdb.DuckDBPyConnection, name: str, statement: str) -> None:
    """Give a query of ours a name in this connection."""
    connection.execute(f"create temp view {name} as {statement}")


def register(connection: duckdb.DuckDBPyConnection, name: str, data: pa.Table) -> None:
    """Show `data` under `name`; `_<table>_0` replaces what the view of a single run's table reads."""
    connection.register(name, data)


def own_text(name: str) -> str:
    """A query of this package: `inspect/compare/paired` is inspect/compare/paired.sql."""
    return (Path(__file__).parents[1] / f"{name}.sql").read_text()


def user_rows(
    connection: duckdb.DuckDBPyConnection, key: str, statement: str, parameters: dict[str, Any] | None = None
) -> pa.Table:
    """Rows of the user's query, which may use any of `parameters`; raises what query() does, naming `key`."""
    try:
        return query(connection, statement, _used(connection, statement, parameters or {}))
    except (UsageError, ResourceError) as error:
        raise type(error)(f"{key}: {error}") from None


def user_columns(
    connection: Connection, key: str, statement: str, parameters: dict[str, Any] | None = None
) -> list[str]:
    """The columns that the user's query would give; computes nothing, and raises what user_rows() does."""
    try:
        return _relation(connection, statement, _used(connection, statement, parameters or {})).columns
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
    except duckdb.Error as error:
        raise UsageError(f"{key}: {_explained(error, None)}") from None


def _used(
    connection: duckdb.DuckDBPyConnection, statement: str, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Those of `parameters` that stand in the statement: DuckDB refuses the others."""
    try:
        names = {name for part in _statements(connection, statement) for name in part.named_parameters}
    except duckdb.Error as error:
        raise _explained(error, None) from None
    return {name: value for name, value in parameters.items() if name in names}


def seed_random(connection: duckdb.DuckDBPyConnection, *numbers: int) -> None:
    """Have random() give the same numbers in every connection that is seeded so; it has to be repeatable."""
    value = int.from_bytes(blake2b(repr(numbers).encode(), digest_size=6).digest()) / 2**48
    connection.execute("select setseed($value)", {"value": value}).fetchall()


def _explained(error: duckdb.Error, timeout_s: float | None) -> GrpoError:
    message = " ".join(str(error).split())
    if isinstance(error, duckdb.InterruptException):
        return ResourceError(f"query: stopped after its limit of {timeout_s:g} s; give --timeout-s more")
    if isinstance(error, duckdb.OutOfMemoryException):
        return ResourceError(f"query: {message}")
    return UsageError(f"query: {message}")


def _outputs(run: Run, iteration: int | range | None, outputs: Collection[str]) -> list[tuple[str, Manifest]]:
    """Every committed output of a run with its manifest, earliest first."""
    found: list[tuple[str, Manifest]] = []
    places: list[tuple[str, int | None]] = [(output, None) for output in RUN_OUTPUTS]
    every = sorted({*run.iterations(), *run.evaluations()}) if iteration is None else iteration
    wanted = [every] if isinstance(every, int) else every
    places += [(output, number) for number in wanted for output in outputs]
    for output, number in places:
        manifest = run.manifest(output, number)
        if manifest is not None:
            found.append((output, manifest))
    return found


def _dataset(run: Run, table: str, outputs: list[tuple[str, Manifest]]) -> Any:
    """The files of one table as an Arrow data set; an empty table when there are none."""
    paths, found = [], tables.schema(table)
    for output, manifest in outputs:
        if table not in TABLES_OF.get(output, (output,)):
            continue
        for file in manifest.files:
            if file.table == table:
                path = run.path_of(file, output, manifest.iteration)
                check_size(file, path)
                try:
                    found = pq.read_schema(path)
                except (pa.ArrowInvalid, OSError) as error:
                    raise CorruptError(f"{path}: cannot be read as Parquet: {error}") from None
                tables.check_schema(table, found, path)
                paths.append(str(path))
    if not paths:
        return found.empty_table()
    return pa.dataset.dataset(paths, schema=found, format="parquet")


def _create_view(connection: duckdb.DuckDBPyConnection, view: str, data: list[tuple[str, pa.Table]]) -> None:
    selects = []
    for index, (run, table) in enumerate(data):
        connection.register(f"_{view}_{index}", table)
        selects.append(f"select '{run}' as run, * from _{view}_{index}")
    connection.execute(f"create view {view} as {' union all by name '.join(selects)}")


def _settings(run: Run, outputs: list[tuple[str, Manifest]]) -> pa.Table:
    prompts = run.id_of("eval_prompts")
    rows = [
        {
            "iteration": manifest.iteration,
            **{name: manifest.config["evaluate"][name] for name in ("pass_reward", "pass_threshold")},
            "same_prompts": manifest.user_files["evaluate.prompts"] == prompts,
        }
        for output, manifest in outputs
        if output == EVALUATION
    ]
    return pa.Table.from_pylist(rows, schema=SETTINGS)


def _pass_settings(run: Run) -> pa.Table:
    evaluate, first = run.config.evaluate, run.config.score.rewards[0].name
    reward = (evaluate.pass_reward if evaluate else None) or first
    row = {"pass_reward": reward, "pass_threshold": evaluate.pass_threshold if evaluate else PASS_THRESHOLD}
    return pa.Table.from_pylist([row], schema=_PASS_SETTINGS)


def _timings(run: Run, outputs: list[tuple[str, Manifest]]) -> pa.Table:
    rows = []
    for output, manifest in outputs:
        for part, seconds in run.timings(output, manifest.iteration).items():
            rows.append(
                {"iteration": manifest.iteration, "stage": manifest.stage, "part": part, "seconds": seconds}
            )
    return pa.Table.from_pylist(rows, schema=_TIMINGS)


def _manifests(outputs: list[tuple[str, Manifest]]) -> pa.Table:
    rows = []
    for output, manifest in outputs:
        fields = {
            name: getattr(manifest, name) for name in ("ids", "inputs", "config", "user_files", "summary")
        }
        texts = {name: json.dumps(value) for name, value in {**fields, "versions": manifest.versions}.items()}
        scalars = {name: getattr(manifest, name) for name in ("iteration", "stage", "attempt", "fingerprint")}
        rows.append({**scalars, **texts, "output": output, "rows": manifest.rows})
    return pa.Table.from_pylist(rows, schema=_MANIFESTS)
