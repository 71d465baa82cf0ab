"""query: what `grpo sql` does with a result: a table on the screen, JSON, CSV, or a file.

A result is read batch by batch, so that it takes no more memory than a batch of it.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo import sql
from grpo.artifacts import ActiveRun, files, refuse_inside_run
from grpo.console import finite, printable, stdout_console, table
from grpo.errors import ResourceError, UsageError
from grpo.inspect import outdated
from grpo.tables import is_number

_ROWS_SHOWN = 200
_WIDE_COLUMNS = 12  # more than fit side by side: a row is shown as lines of name and value
_WIDE_ROWS_SHOWN = 20
_CELL_CHARACTERS = 10_000  # shown of a text; what is longer is for a file
_ROW_GROUP_BYTES, _CHUNK_BYTES = 2**26, 2**22  # of a Parquet file; of a copy


def answer(
    runs: Sequence[ActiveRun],
    query: str,
    out: Path | None,
    timeout_s: float,
    as_json: bool,
    as_csv: bool = False,
) -> None:
    """`grpo sql`: one query, of the command line or of stdin; at a terminal one after the other."""
    if as_csv and (as_json or out is not None):
        raise UsageError("--csv: is for stdout; leave out --json and --out, or give --out FILE.csv alone")
    if out is not None:
        check_out(out, [])
    to_screen = out is None and not as_json and not as_csv

    def run_query(text: str) -> None:
        question = sql.Question(text, runs, rows=_ROWS_SHOWN + 1 if to_screen else None)
        rows = user_sql.rows(question, timeout_s=timeout_s)
        outdated.say(runs, outputs=outdated.read_by(text))
        if out is not None:
            write(rows, out)
        elif to_screen:
            _print(rows)
        else:
            _check_names(rows.schema, "--csv" if as_csv else "--json")
            for text in _csv(rows, "--csv") if as_csv else chain(_json(rows), "\n"):
                sys.stdout.write(text)

    with sql.UserSql() as user_sql:
        if query:
            run_query(query)
        elif not sys.stdin.isatty():
            run_query(sys.stdin.read())
        elif out is not None:
            raise UsageError("--out: give the query too")
        else:
            _converse(run_query)


def _converse(run_query: Callable[[str], None]) -> None:
    while (line := _ask()) not in (None, "exit", "quit"):
        try:
            if line:
                run_query(line)
        except (UsageError, ResourceError) as error:
            print(printable(str(error)), file=sys.stderr, flush=True)


def _ask() -> str | None:
    import readline  # noqa: F401 - gives input() a history and arrow keys

    prompt = "grpo> "
    if not sys.stdout.isatty():  # there is data in it
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip().rstrip(";")
    except (EOFError, KeyboardInterrupt):
        return None


def check_out(out: Path, nested: list[str]) -> None:
    """Raise UsageError (exit 2) for a file that write() cannot write; nested: columns of lists or maps."""
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no folder {out.parent}")
    refuse_inside_run(out)
    if out.suffix not in (".parquet", ".csv", ".json"):
        raise UsageError(f"--out {out}: expected a file ending in .parquet, .csv or .json")
    if out.suffix == ".csv" and nested:
        wrong = f"column {nested[0]} is a list or map, which CSV has no place for"
        raise UsageError(f"--out {out}: {wrong}; use .parquet or .json")


def write(rows: sql.Rows, out: Path) -> None:
    """Write a result in the format that the file's name says. Raises UsageError (exit 2)."""
    check_out(out, _nested(rows.schema))
    _check_names(rows.schema, f"--out {out}")
    if out.suffix == ".parquet":
        with tempfile.TemporaryFile(prefix="grpo-sql-") as file:
            with files.resource_errors(Path(tempfile.gettempdir())):
                _write_parquet(rows, file, out)
            file.seek(0)
            files.write_chunks(out, iter(lambda: file.read(_CHUNK_BYTES), b""))
    else:
        texts = chain(_json(rows), "\n") if out.suffix == ".json" else _csv(rows, f"--out {out}")
        files.write_chunks(out, (text.encode() for text in texts))


def _check_names(schema: pa.Schema, where: str) -> None:
    """Raise UsageError (exit 2) for two columns of one name, of which a reader would see one."""
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UsageError(f"{where}: two columns are named {name}; name them apart with `as`")


def _nested(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_nested(field.type)]


def _write_parquet(rows: sql.Rows, file: Any, out: Path) -> None:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetWriter(file, rows.schema, compression="zstd") as writer:
            group: list[pa.RecordBatch] = []
            for batch in rows.batches:
                group.append(batch)
                if sum(each.nbytes for each in group) >= _ROW_GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(group, rows.schema))
                    group = []
            writer.write_table(pa.Table.from_batches(group, rows.schema))
    except pa.ArrowNotImplementedError as error:
        raise UsageError(f"--out {out}: Parquet has no such type: {error}; cast it with ::varchar") from None


def _csv(rows: sql.Rows, where: str) -> Iterator[str]:
    """The text of a result as CSV, a batch at a time. Raises UsageError (exit 2) for lists and maps."""
    import pyarrow.csv as pacsv

    if nested := _nested(rows.schema):
        raise UsageError(
            f"{where}: column {nested[0]} is a list or map, which CSV has no place for; use JSON"
        )
    empty = pa.RecordBatch.from_pylist([], rows.schema)
    for number, batch in enumerate(chain([empty], rows.batches)):
        sink = pa.BufferOutputStream()
        pacsv.write_csv(batch, sink, pacsv.WriteOptions(include_header=number == 0))
        yield sink.getvalue().to_pybytes().decode()


def _json(rows: sql.Rows) -> Iterator[str]:
    """The text of a result as a JSON list, a row at a time."""
    between = "[\n "
    for row in _each(rows):
        try:
            text = json.dumps(finite(row), indent=1, default=_plain, allow_nan=False)
        except TypeError as error:  # keys of a map
            raise UsageError(
                f"query: JSON has no place for a value: {error}; cast it with ::varchar"
            ) from None
        yield between + text.replace(
            "\n", "\n "
        )  # the line ends of text are escaped: these are of the layout
        between = ",\n "
    yield "[]" if between.startswith("[") else "\n]"


def _plain(value: Any) -> int | float | str:
    """A number or text in the place of what JSON has no word for: whole numbers whole, no digit lost."""
    if not isinstance(value, Decimal):
        return str(value)
    if value.same_quantum(Decimal(1)):
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else str(value)


def _each(rows: sql.Rows) -> Iterator[dict[str, Any]]:
    """Rows by column. Raises UsageError (exit 2) for a date that Python has no place for."""
    try:
        for batch in rows.batches:
            yield from batch.to_pylist(maps_as_pydicts="strict")
    except (OverflowError, ValueError) as error:
        raise UsageError(f"query: a value cannot be shown: {error}; cast it with ::varchar") from None


def _print(rows: sql.Rows) -> None:
    names, is_wide = rows.schema.names, len(rows.schema) > _WIDE_COLUMNS
    shown = _WIDE_ROWS_SHOWN if is_wide else _ROWS_SHOWN
    unique = [str(number) for number in range(len(names))]  # two columns may have one name
    schema = pa.schema(rows.schema.field(at).with_name(name) for at, name in enumerate(unique))
    renamed = sql.Rows(schema, (batch.rename_columns(unique) for batch in rows.batches))
    found = [list(row.values()) for row in islice(_each(renamed), shown + 1)]
    console = stdout_console()
    if is_wide:
        _print_lines(names, found[:shown])
    else:
        left = [field.name for field in rows.schema if not is_number(field.type)]
        console.print(table(names, (map(_cell, row) for row in found[:shown]), left))
    if len(found) > shown:
        console.print(f"the first {shown} rows; --out FILE writes all", style="dim")


def _print_lines(names: list[str], rows: Iterable[list[Any]]) -> None:
    width = max(map(len, names))
    for number, row in enumerate(rows):
        print(f"row {number}")
        for name, value in zip(names, row, strict=True):
            print(f"  {printable(name):<{width}}  {_cell(value)}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if len(text) > _CELL_CHARACTERS:
        text = f"{text[:_CELL_CHARACTERS]}... ({len(text):,} characters; --out FILE writes all)"
    return printable(text)
