"""connection: DuckDB over the tables of runs. Views only; nothing is stored, nothing can be written.

Tables are registered as Arrow data sets; then the connection loses access to everything else and its
configuration is locked. Filtering statements would be no sandbox: a SELECT can write files, so the connection
itself cannot.
"""

import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from grpo import tables
from grpo.artifacts import OUTPUTS, ActiveRun
from grpo.errors import GrpoError, ResourceError, UsageError
from grpo.sql.run_tables import NAMES, RunTables

VIEWS = (*tables.TABLES, "samples", "iterations", "eval_samples", "evals", "timings", "manifests")
MEMORY_GIB = 1.0
# Each a query in a file of its name, over views that come before it.
_DERIVED = ("samples", "eval_samples", "evals", "iterations")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Connection:
    """A closed-off DuckDB, the tables that it shows, and the names that register() has given other rows."""

    duckdb: duckdb.DuckDBPyConnection
    tables: RunTables
    replaced: set[str] = field(default_factory=set)


@contextmanager
def connect(
    runs: list[ActiveRun],
    iteration: int | range | None = None,
    outputs: Collection[str] = tuple(OUTPUTS),
    repeatable: bool = False,
) -> Iterator[Connection]:
    """A closed-off connection whose views are the tables of `runs`, or of one `iteration` or some of them.

    `outputs`: those of which tables are shown; the tables of the others are empty. repeatable: equal tables
    give equal rows in an equal order: one thread, and no timings or manifests, which tell equal runs apart.

    A query raises CorruptError when a file that it reads is missing, has another size or another schema.
    """
    with _connected(RunTables(runs, iteration, outputs, repeatable)) as connection:
        yield connection


@contextmanager
def _connected(shown: RunTables) -> Iterator[Connection]:
    spill = tempfile.TemporaryDirectory(prefix="grpo-sql-")  # what does not fit into memory goes here
    database = duckdb.connect(
        ":memory:",
        config={
            "temp_directory": spill.name,
            "memory_limit": f"{MEMORY_GIB}GiB",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
            "preserve_insertion_order": "false",
            **({"threads": 1} if shown.repeatable else {}),
        },
    )
    try:
        database.execute("set enable_progress_bar = false")
        for view in NAMES:
            _register(database, shown, view)
            selects = [
                f"select '{run.name}' as run, * from _{view}_{index}" for index, run in enumerate(shown.runs)
            ]
            database.execute(f"create view {view} as {' union all by name '.join(selects)}")
        for view in _DERIVED:
            text = own_text(f"sql/views/{view}")
            database.execute(f"create view {view} as {text}")
        for setting in ("enable_external_access = false", "lock_configuration = true"):
            database.execute(f"set {setting}")
        yield Connection(database, shown)
    finally:
        database.close()
        spill.cleanup()


def _register(database: duckdb.DuckDBPyConnection, shown: RunTables, view: str) -> None:
    for index, run in enumerate(shown.runs):
        database.register(f"_{view}_{index}", shown.table(run, view))


def turn_to(connection: Connection, iteration: int) -> None:
    """Show what the runs hold of another iteration now: a new connection takes 30 ms."""
    connection.tables.turn_to(iteration)
    for view in NAMES:
        if f"_{view}_0" in connection.replaced:
            _register(connection.duckdb, connection.tables, view)
    connection.replaced.clear()


def query(
    connection: Connection,
    statement: str,
    parameters: dict[str, Any] | None = None,
    timeout_s: float | None = None,
) -> pa.Table:
    """The rows of one statement.

    Raises UsageError (exit 2) with DuckDB's message or for two statements, ResourceError (exit 7) over a
    limit, CorruptError (exit 6) for a damaged file.
    """
    timer = threading.Timer(timeout_s or 0, connection.duckdb.interrupt)
    try:
        if timeout_s:
            timer.start()
        return _relation(connection, statement, parameters).to_arrow_table()
    except duckdb.Error as error:
        if connection.tables.failure is not None:
            raise connection.tables.failure from None
        connection.tables.check_content()
        raise _explained(error, timeout_s) from None
    except RuntimeError as error:
        if "interrupt" not in str(error).lower():
            raise
        raise KeyboardInterrupt from None  # which is what it was before DuckDB made this of it
    finally:
        timer.cancel()


def columns(connection: Connection, statement: str, parameters: dict[str, Any]) -> list[str]:
    """The columns that one statement would give; computes nothing, and raises UsageError as query() does."""
    try:
        return _relation(connection, statement, parameters).columns
    except duckdb.Error as error:
        raise _explained(error) from None


def parameters_in(connection: Connection, text: str) -> set[str]:
    """Names of the $parameters in the statements of `text`. Raises UsageError for what cannot be parsed."""
    try:
        return {name for part in _statements(connection, text) for name in part.named_parameters}
    except duckdb.Error as error:
        raise _explained(error) from None


def _relation(
    connection: Connection, statement: str, parameters: dict[str, Any] | None
) -> duckdb.DuckDBPyRelation:
    """What one statement would give; of a select nothing is computed yet."""
    number = len(_statements(connection, statement))
    if number > 1:  # DuckDB would run each and give the rows of the last
        raise UsageError(f"query: {number} statements, divided by `;`; write one")
    relation = connection.duckdb.sql(statement, params=parameters)
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
    return connection.duckdb.extract_statements(text)


def read(
    runs: list[ActiveRun],
    statement: str,
    parameters: dict[str, Any] | None = None,
    iteration: int | None = None,
    timeout_s: float | None = None,
) -> pa.Table:
    """The rows of one statement over runs that may be worked on meanwhile; errors as query's."""
    return consult(runs, lambda connection: query(connection, statement, parameters, timeout_s), iteration)


def consult(
    runs: list[ActiveRun], work: Callable[[Connection], _Result], iteration: int | None = None
) -> _Result:
    """What `work` makes of several queries over one state of runs that may be worked on meanwhile.

    Where something was replaced while it was read, all is read again.
    """
    while True:
        shown = RunTables(runs, iteration)
        try:
            with _connected(shown) as connection:
                result = work(connection)
        except (GrpoError, OSError):
            if shown.are_current():
                raise
        else:
            if shown.are_current():
                return result


def create_view(connection: Connection, name: str, statement: str) -> None:
    """Give a query of ours a name in this connection."""
    connection.duckdb.execute(f"create temp view {name} as {statement}")


def register(connection: Connection, name: str, data: pa.Table) -> None:
    """Show `data` under `name`; `_<table>_0` replaces what the view of a single run's table reads."""
    connection.duckdb.register(name, data)
    connection.replaced.add(name)


def own_text(name: str) -> str:
    """A query of this package: `inspect/compare/paired` is inspect/compare/paired.sql."""
    return (Path(__file__).parents[1] / f"{name}.sql").read_text()


def seed_random(connection: Connection, *numbers: int) -> None:
    """Have random() give the same numbers in every connection that is seeded so; it has to be repeatable."""
    value = int.from_bytes(blake2b(repr(numbers).encode(), digest_size=6).digest()) / 2**48
    connection.duckdb.execute("select setseed($value)", {"value": value}).fetchall()


def _explained(error: duckdb.Error, timeout_s: float | None = None) -> GrpoError:
    message = " ".join(str(error).split())
    if isinstance(error, duckdb.InterruptException):
        return ResourceError(f"query: stopped after its limit of {timeout_s:g} s; give --timeout-s more")
    if isinstance(error, duckdb.OutOfMemoryException):
        return ResourceError(f"query: {message}")
    return UsageError(f"query: {message}")
