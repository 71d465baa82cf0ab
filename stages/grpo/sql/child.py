"""child: the process in which a user's SQL works, so that it can be stopped whatever it does.

DuckDB cannot interrupt every function, and its memory limit does not know what strings, lists and results
take. Here a query takes what it takes: over the memory limit the process ends itself, over the time limit
guarded.py ends it. Requests and replies are JSON; rows go through a file.
"""

import json
import os
import queue
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from grpo.artifacts import files
from grpo.errors import GrpoError, ResourceError
from grpo.sql import connection as sql
from grpo.sql.question import Question, from_json

PROCESS_GIB = 1.75
"""What the process may take of memory, with the GiB of DuckDB's tables and Arrow's buffers."""
_LOOK_S = 0.02
_ROWS = 2048  # of a batch: what DuckDB makes at a time
_RESULT_GIB = 8  # on the disk of temporary files
_INT64 = 2**63
# What Arrow has no type for, or gets wrong (a uhugeint above 2^127 becomes negative): as DuckDB writes it.
_AS_TEXT = {"UHUGEINT", "BIGNUM", "BIT", "INTERVAL", "TIME WITH TIME ZONE", "VARIANT"}


def main() -> None:
    """The process where it is a new one: its stdin is the pipe."""
    folder, log = sys.argv[2:]
    begin(Connection(os.dup(0)), folder, log)


def begin(pipe: "Connection[bytes, bytes]", folder: str, log: str) -> NoReturn:
    """Answer requests until the pipe ends, which it does with the process at its other end."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for the process that asks
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        said = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
        tempfile.tempdir = folder  # for what does not fit into memory: who asks removes it
        os.dup2(said, 1)  # what a library prints is no result
        os.dup2(said, 2)
        requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for work in (partial(_listen, pipe, requests, Path(folder)), _watch):
            threading.Thread(target=work, daemon=True).start()
        pipe.send_bytes(b'{"ready": true}')
        while True:
            pipe.send_bytes(json.dumps(_reply(from_json(requests.get()), Path(folder))).encode())
    finally:  # a copy of the process that asks must not go on as that one
        traceback.print_exc()
        os._exit(1)


def _listen(pipe: "Connection[bytes, bytes]", requests: "queue.SimpleQueue[bytes]", folder: Path) -> None:
    with suppress(EOFError, ConnectionResetError):
        while True:
            requests.put(pipe.recv_bytes())
    with suppress(GrpoError, OSError):  # who asked may be removing it too
        files.remove(folder)
    os._exit(0)


def _watch() -> None:
    while _resident_bytes() < PROCESS_GIB * 2**30:
        time.sleep(_LOOK_S)
    os._exit(ResourceError.exit_code)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no Linux: the largest so far, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reply(question: Question, folder: Path) -> dict[str, Any]:
    try:
        return sql.snapshot(
            question.runs,
            lambda connection: _answer(connection, question, folder),
            question.iteration,
            question.outputs,
            question.repeatable,
        )
    except GrpoError as error:
        message = str(error)
        if question.condition_of is not None:  # the lines are of a query that the user did not write
            message = message.partition(" LINE ")[0]
        return {"error": type(error).__name__, "message": message}


def _answer(connection: sql.Connection, question: Question, folder: Path) -> dict[str, Any]:
    """What one connection says: the columns of the statement, or the file that its rows are in."""
    for name, data in question.tables.items():
        sql.register(connection, name, data)
    if question.weights is not None:
        sql.create_scored(connection, question.weights, unrewarded=question.unrewarded)
    if question.seed is not None:
        sql.seed_random(connection, *question.seed)
    statement = question.statement
    if question.condition_of is not None:
        columns, table = question.condition_of
        # Pasted, since SQL has no parameter for a condition: one expression cannot end its brackets.
        sql.check_condition(connection, statement, table, question.parameters)
        statement = f"select {columns} from {table} where (\n{statement}\n)"
    with sql.checked(connection):
        found = sql.relation(connection, statement, question.parameters, question.all_used)
        if question.rows == 0:
            return {"columns": found.columns}
        if _AS_TEXT.intersection(map(str, found.types)):
            each = zip(found.columns, map(str, found.types), strict=True)
            found = found.project(", ".join(_column(at, *column) for at, column in enumerate(each, 1)))
        return _written(found.to_arrow_reader(_ROWS), folder / "rows.arrow", question.rows)


def _column(position: int, name: str, kind: str) -> str:
    """How column `position` is selected, under its name."""
    return f'#{position}{"::varchar" if kind in _AS_TEXT else ""} as "{name.replace(chr(34), chr(34) * 2)}"'


def _written(reader: pa.RecordBatchReader, path: Path, rows: int | None) -> dict[str, Any]:
    """Write the first `rows`, or all, as an Arrow file; `whole`: columns of decimals that fit into int64."""
    schema, written = reader.schema, 0
    whole = {at for at, kind in enumerate(schema.types) if pa.types.is_decimal(kind) and kind.scale == 0}
    with (
        files.resource_errors(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, schema) as out,
    ):
        for batch in reader:
            out.write_batch(batch)
            whole = {at for at in whole if _fits(batch.column(at))}
            written += len(batch)
            if sink.tell() > _RESULT_GIB * 2**30:
                raise ResourceError(f"query: gives more than {_RESULT_GIB} GiB; ask for less of it at a time")
            if rows is not None and written >= rows:
                break
    return {"file": str(path), "whole": sorted(whole)}


def _fits(values: pa.Array) -> bool:
    ends = pc.min_max(values).as_py()
    return ends["min"] is None or (ends["min"] >= -_INT64 and ends["max"] < _INT64)
