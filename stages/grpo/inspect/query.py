"""query: what `grpo sql` does with a result: a table on the screen, JSON, or a file."""

import json
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo import sql
from grpo.artifacts import ActiveRun, files, refuse_inside_run
from grpo.console import finite, printable, stdout_console, table
from grpo.errors import UsageError

_ROWS_SHOWN = 200
_WIDE_COLUMNS = 12  # more than fit side by side: a row is shown as lines of name and value
_WIDE_ROWS_SHOWN = 20


def answer(runs: list[ActiveRun], query: str, out: Path | None, timeout_s: float, as_json: bool) -> None:
    """`grpo sql`: one query, or a prompt that takes one after the other."""
    if not 0 < timeout_s <= threading.TIMEOUT_MAX:  # NaN is not
        raise UsageError(f"--timeout-s {timeout_s:g}: expected seconds, more than 0 and finite")
    if query:
        _deliver(sql.read(runs, query, timeout_s=timeout_s), out, as_json)
        return
    while (line := _ask()) not in (None, "exit", "quit"):
        try:
            if line:
                _deliver(sql.read(runs, line, timeout_s=timeout_s), None, as_json)
        except UsageError as error:
            runs[0].console.say(str(error))


def _ask() -> str | None:
    import readline  # noqa: F401 - gives input() a history and arrow keys

    try:
        return input("grpo> ").strip().rstrip(";")
    except (EOFError, KeyboardInterrupt):
        return None


def _deliver(data: pa.Table, out: Path | None, as_json: bool) -> None:
    if out is not None:
        write(data, out)
    elif as_json:
        print(_json(data))
    else:
        _print(data)


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


def write(data: pa.Table, out: Path) -> None:
    """Write a result in the format that the file's name says; errors as check_out's."""
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    check_out(out, [field.name for field in data.schema if pa.types.is_nested(field.type)])
    sink = pa.BufferOutputStream()
    if out.suffix == ".parquet":
        pq.write_table(data, sink, compression="zstd")
    elif out.suffix == ".json":
        sink.write((_json(data) + "\n").encode())
    else:
        pacsv.write_csv(data, sink)
    files.write_file(out, sink.getvalue().to_pybytes())


def _json(data: pa.Table) -> str:
    def plain(value: Any) -> float | str:
        return float(value) if isinstance(value, Decimal) else str(value)

    rows = finite(data.to_pylist(maps_as_pydicts="strict"))
    return json.dumps(rows, indent=1, default=plain, allow_nan=False)


def _print(data: pa.Table) -> None:
    console, is_wide = stdout_console(), data.num_columns > _WIDE_COLUMNS
    shown = _WIDE_ROWS_SHOWN if is_wide else _ROWS_SHOWN
    rows = data.slice(0, shown).to_pylist(maps_as_pydicts="strict")
    if is_wide:
        width = max(map(len, data.column_names))
        for number, row in enumerate(rows):
            print(f"row {number}")
            for name, value in row.items():
                print(f"  {printable(name):<{width}}  {_cell(value)}")
    else:
        types = {field.name: field.type for field in data.schema}
        left = [
            name
            for name, kind in types.items()
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind))
        ]
        console.print(table(data.column_names, [map(_cell, row.values()) for row in rows], left))
    if len(data) > shown:
        console.print(f"{len(data):,} rows, the first {shown} shown; --out FILE writes all", style="dim")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))
