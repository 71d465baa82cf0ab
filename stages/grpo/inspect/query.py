"""query: what `grpo sql` does with a result: a table on the screen, JSON, or a file."""

import json
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo import sql
from grpo.artifacts import ActiveRun, files
from grpo.console import finite, printable, stdout_console, table
from grpo.errors import UsageError

_SUFFIXES = (".parquet", ".csv", ".json")
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
        _print_table(data)


def check_out(out: Path) -> None:
    """Raise UsageError (exit 2) where write() would have no place, or know no format, for a file."""
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no folder {out.parent}")
    if out.suffix not in _SUFFIXES:
        raise UsageError(
            f"--out {out}: expected a file ending in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        )


def write(data: pa.Table, out: Path) -> None:
    """Write a result in the format that the file's name says; errors as check_out's."""
    check_out(out)
    files.write_file(out, _encoded(data, out))


def _encoded(data: pa.Table, out: Path) -> bytes:
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    if out.suffix == ".parquet":
        pq.write_table(data, sink, compression="zstd")
    elif out.suffix == ".csv":
        nested = [f.name for f in data.schema if pa.types.is_nested(f.type)]
        if nested:
            raise UsageError(f"--out {out}: column {nested[0]} is a list or map, which CSV has no place for")
        pacsv.write_csv(data, sink)
    else:
        return (_json(data) + "\n").encode()
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _json(data: pa.Table) -> str:
    rows = finite(data.to_pylist(maps_as_pydicts="strict"))
    return json.dumps(rows, indent=1, default=_plain, allow_nan=False)


def _plain(value: Any) -> float | str:
    return float(value) if isinstance(value, Decimal) else str(value)


def _print_table(data: pa.Table) -> None:
    if data.num_columns > _WIDE_COLUMNS:
        _print_records(data)
        return
    numeric = [pa.types.is_integer(field.type) or pa.types.is_floating(field.type) for field in data.schema]
    left = {name for name, right in zip(data.column_names, numeric, strict=True) if not right}
    rows = data.slice(0, _ROWS_SHOWN).to_pylist(maps_as_pydicts="strict")
    cells = [[_cell(value) for value in row.values()] for row in rows]
    console = stdout_console()
    console.print(table(data.column_names, cells, left))
    if len(data) > _ROWS_SHOWN:
        console.print(
            f"{len(data):,} rows, the first {_ROWS_SHOWN} shown; --out FILE writes all", style="dim"
        )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


def _print_records(data: pa.Table) -> None:
    width = max(map(len, data.column_names))
    for number, row in enumerate(data.slice(0, _WIDE_ROWS_SHOWN).to_pylist(maps_as_pydicts="strict")):
        print(f"row {number}")
        for name, value in row.items():
            print(f"  {printable(name):<{width}}  {_cell(value)}")
    if len(data) > _WIDE_ROWS_SHOWN:
        print(f"{len(data):,} rows, the first {_WIDE_ROWS_SHOWN} shown; --out FILE writes all")
