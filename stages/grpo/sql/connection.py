"""connection: DuckDB over the tables of runs. Views only; nothing is stored, nothing can be written.

It loses access to everything but the tables, and its configuration is locked: filtering statements would be
no sandbox, since a SELECT can write files.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.dataset

from grpo.artifacts import OUTPUTS, Run
from grpo.errors import GrpoError, ResourceError, UsageError
from grpo.sql.run_tables import NAMES, RunTables

# Each a query in a file of its name, over views that come before it.
_DERIVED = ("samples", "eval_samples", "evals", "iterations")

# `pivot` is a MULTI, and anything that reads is one of the others.
_QUERIES = tuple(getattr(duckdb.StatementType, name) for name in ("SELECT", "EXPLAIN", "MULTI"))
MEMORY_GIB = 1
"""What DuckDB may take of memory for its tables; what does not fit is on disk meanwhile."""
LAST_GROUP = 2**31 - 1  # all that group_id can be

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Connection:
    """A closed-off DuckDB, the tables that it shows, and the names that register() has given other rows."""

    duckdb: duckdb.DuckDBPyConnection
    tables: RunTables
    replaced: set[str] = field(default_factory=set)


@contextmanager
def connect(
    runs: Sequence[Run],
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
    options: dict[str, Any] = {
        "temp_directory": spill.name,
        "memory_limit": f"{MEMORY_GIB}GiB",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "python_enable_replacements": "false",
        "preserve_insertion_order": "false",
        **({"threads": 1} if shown.repeatable else {}),
    }
    with spill, duckdb.connect(":memory:", config=options) as database:
        with suppress(duckdb.InvalidInputException):  # in a notebook without ipywidgets it is off, for good
            database.execute("set enable_progress_bar = false")
        database.execute(own_text("sql/macros"))
        for view in NAMES:
            _register(database, shown, view)
            names = [run.name.replace("'", "''") for run in shown.runs]  # a folder may be called anything
            selects = [f"select '{name}' as run, * from _{view}_{at}" for at, name in enumerate(names)]
            database.execute(f"create view {view} as {' union all by name '.join(selects)}")
        for view in _DERIVED:
            database.execute(f"create view {view} as {own_text(f'sql/views/{view}')}")
        database.execute("set enable_external_access = false; set lock_configuration = true")
        yield Connection(database, shown)


def _register(database: duckdb.DuckDBPyConnection, shown: RunTables, view: str) -> None:
    for index, run in enumerate(shown.runs):
        database.register(f"_{view}_{index}", shown.table(run, view))


def show_iteration(connection: Connection, iteration: int) -> None:
    """Show what the runs hold of another iteration now: a new connection takes 30 ms."""
    connection.tables.show_iteration(iteration)
    for view in NAMES:
        if f"_{view}_0" in connection.replaced:
            _register(connection.duckdb, connection.tables, view)
    connection.replaced.clear()


def query(connection: Connection, statement: str, parameters: dict[str, Any] | None = None) -> pa.Table:
    """The rows of one statement, which may use any of `parameters`.

    Raises UsageError (exit 2) for what is no query or cannot be run, ResourceError (7), CorruptError (6).
    """
    with checked(connection):
        return relation(connection, statement, parameters).to_arrow_table()


@contextmanager
def checked(connection: Connection) -> Iterator[None]:
    """What DuckDB raises in a `with` block, as an error of ours.

    Raises UsageError (exit 2) with DuckDB's message, ResourceError (exit 7) over the memory limit,
    CorruptError (exit 6) for a damaged file.
    """
    try:
        yield
    except duckdb.Error as error:
        if connection.tables.failure is not None:
            raise connection.tables.failure from None
        connection.tables.check_content()
        if isinstance(error, duckdb.OutOfMemoryException):  # its advice is for settings that are locked
            limit = f"needs more memory than its limit of {MEMORY_GIB:g} GiB"
            raise ResourceError(f"query: {limit}; ask for less of it at a time") from None
        raise UsageError(f"query: {' '.join(str(error).split())}") from None
    except RuntimeError as error:
        if "interrupt" not in str(error).lower():
            raise
        raise KeyboardInterrupt from None  # which is what it was before DuckDB made this of it


def relation(
    connection: Connection,
    statement: str,
    parameters: Mapping[str, Any] | None = None,
    all_used: bool = False,
) -> duckdb.DuckDBPyRelation:
    """What one query would give; nothing is computed yet. Raises UsageError (exit 2) for anything else.

    all_used: a parameter that it does not name is refused too.
    """
    _check_text(statement)
    parts = connection.duckdb.extract_statements(statement)
    if len(parts) > 1:  # DuckDB would run each and give the rows of the last
        raise UsageError(f"query: {len(parts)} statements, divided by `;`; write one")
    if not parts or parts[0].type not in _QUERIES:
        what = f"{parts[0].type.name} " if parts else ""
        raise UsageError(f"query: {what}gives no rows; write a select")
    named = parts[0].named_parameters  # DuckDB refuses others
    used = {name: value for name, value in (parameters or {}).items() if name in named}
    for name in parameters or {} if all_used else ():
        if name not in named:
            raise UsageError(f"query: parameter {name}: the query has no ${name}; leave it out")
    return connection.duckdb.sql(statement, params=used or None)


def check_condition(
    connection: Connection, text: str, table: str, parameters: Mapping[str, Any] | None = None
) -> None:
    """Raise UsageError (exit 2) where `text` is not one SQL expression over `table` that is true or false.

    One expression is one in brackets too.
    """
    _check_text(text)
    own, plain = (_parsed(connection, f"select {written}") for written in (text, "true"))
    if own["error"]:
        raise UsageError(f"query: {own['error_message']}; expected one condition")
    if (count := len(own["statements"])) > 1:
        raise UsageError(f"query: {count} statements, divided by `;`; write one")
    if any(kind == duckdb.token_type.comment for _, kind in duckdb.tokenize(text)):
        raise UsageError("query: has a comment; expected one condition")
    node, expected = own["statements"][0]["node"], plain["statements"][0]["node"]
    expected.pop("select_list")
    [first, *others] = node.pop("select_list", None) or [{}]
    if others or first.get("alias") or first.get("class") == "STAR" or node != expected:
        raise UsageError("query: is more than one expression; expected one condition")
    with checked(connection):
        [kind] = relation(connection, f"select (\n{text}\n) from {table}", parameters).types
    if str(kind) not in ("BOOLEAN", '"NULL"'):  # DuckDB would make one of it: 0.5 is true
        raise UsageError(f"query: is of type {kind}; expected a condition, true or false, such as reward > 0")


def _parsed(connection: Connection, statement: str) -> dict[str, Any]:
    """The syntax tree of a statement, or what is wrong with it; nothing of it is computed."""
    tree = connection.duckdb.execute("select json_serialize_sql($text)", {"text": statement}).fetchall()
    found: dict[str, Any] = json.loads(tree[0][0])
    return found


def _check_text(statement: str) -> None:
    try:
        statement.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"query: character {error.start} is a lone surrogate, no text; leave it out"
        ) from None


def read(
    runs: Sequence[Run],
    statement: str,
    parameters: dict[str, Any] | None = None,
    iteration: int | None = None,
) -> pa.Table:
    """The rows of one statement over runs that may be worked on meanwhile.

    Raises UsageError (exit 2) for no query, ResourceError (7) over a limit, CorruptError (6) for damage.
    """
    return snapshot(runs, lambda connection: query(connection, statement, parameters), iteration)


def snapshot(
    runs: Sequence[Run],
    work: Callable[[Connection], _Result],
    iteration: int | range | None = None,
    outputs: Collection[str] = tuple(OUTPUTS),
    repeatable: bool = False,
) -> _Result:
    """What `work` makes of several queries over one state of runs that may be worked on meanwhile.

    Where something was replaced while it was read, all is read again.
    """
    while True:
        shown = RunTables(runs, iteration, outputs, repeatable)
        try:
            with _connected(shown) as connection:
                result = work(connection)
        except (GrpoError, OSError):
            if shown.are_current():
                raise
        else:
            if shown.are_current():
                return result


def rows(connection: Connection, name: str, **parameters: Any) -> list[dict[str, Any]]:
    """The rows of a query of this package, named as for own_text()."""
    data = query(connection, own_text(name), parameters)
    found: list[dict[str, Any]] = data.to_pylist(maps_as_pydicts="strict")
    return found


def register(connection: Connection, name: str, data: pa.Table | pa.dataset.Dataset) -> None:
    """Show `data` under `name`; `_<table>_0` replaces what the view of a single run's table reads."""
    connection.duckdb.register(name, data)
    connection.replaced.add(name)


def create_scored(connection: Connection, weights: Collection[float], *, unrewarded: bool = False) -> None:
    """Make the view `scored` in a connection to the tables of one iteration; weights: of its rewards.

    scored.sql alone says what a reward is, which rollouts are compared, and which groups have no signal.
    unrewarded: without any reward of a weight, every rollout counts, for teachers to judge.
    """
    set_weights(connection, weights, unrewarded=unrewarded)
    limit_scored(connection)
    create = "create or replace temp view"
    connection.duckdb.execute(f"{create} _scored as {own_text('sql/views/scored')}")
    connection.duckdb.execute(f"{create} scored as select * from _scored")


def limit_scored(connection: Connection, first: int = 0, last: int = LAST_GROUP) -> None:
    """Have the view `scored` show the groups `first` to `last`, and compute no more than that."""
    connection.duckdb.execute(f"set variable first_group = {first}; set variable last_group = {last}")


def set_weights(connection: Connection, weights: Collection[float], *, unrewarded: bool = False) -> None:
    """Have a view `scored` that exists go by other weights."""
    number = sum(weight != 0 for weight in weights)
    names = pa.table({"number": [number], "unrewarded": [unrewarded and number == 0]})
    register(connection, "reward_names", names)


def own_text(name: str) -> str:
    """A query of this package: `inspect/compare/paired` is inspect/compare/paired.sql."""
    return (Path(__file__).parents[1] / f"{name}.sql").read_text()


def seed_random(connection: Connection, *numbers: int) -> None:
    """Have random() give the same numbers in every connection that is seeded so; it has to be repeatable."""
    value = int.from_bytes(blake2b(repr(numbers).encode(), digest_size=6).digest()) / 2**48
    connection.duckdb.execute("select setseed($value)", {"value": value}).fetchall()
