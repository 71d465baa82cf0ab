"""guarded: SQL that others wrote, in a process of its own with limits of memory and time.

The process is started by the first query and lives until close(); one that went over a limit is killed, and
the next query starts another.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa

from grpo import errors
from grpo.artifacts import files
from grpo.errors import ResourceError, UsageError
from grpo.sql import child
from grpo.sql.question import Question, to_json

TIMEOUT_S = 600.0
"""What a query may take where nothing else is said."""
_MORE_TIME = "give --timeout-s more"
_CONFIGURED = "ask for less of it at a time, or raise sql_timeout_s"
_LESS = "ask for less of it at a time"
_LOG = "stderr"  # of the process
_START_S = 120.0  # of the process, on a cold disk
_LOOK_S = 0.1  # how often a request to stop is looked for
# The first path: the same package as here, and nothing of the folder that happens to be the present one.
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from grpo.sql.child import main; main()"


class Rows(NamedTuple):
    """A result that is read batch by batch, so that it need not fit into memory; its file goes with it."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]

    def table(self) -> pa.Table:
        """All of it."""
        return pa.Table.from_batches(self.batches, self.schema)


class UserSql:
    """The process. stop: raises what ends a query at once, where somebody asked for that."""

    def __init__(self, stop: Callable[[], object] = lambda: None) -> None:
        self._stop = stop
        self._pid: int | None = None
        self._ready, self._starts = False, 0

    def __enter__(self) -> "UserSql":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="grpo-sql-", ignore_cleanup_errors=True)
        self._pipe, end = Pipe()
        self._starts += 1
        log = str(Path(self._folder.name, _LOG))
        with end:
            if self._starts == 1 and _may_fork():
                self._pid = os.fork()
                if not self._pid:
                    self._pipe.close()
                    child.begin(end, self._folder.name, log)
            else:
                package = str(Path(__file__).parents[2])
                self._pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-P", "-c", _PROGRAM, package, self._folder.name, log],
                    os.environ,
                    file_actions=[(os.POSIX_SPAWN_DUP2, end.fileno(), 0)],
                )

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._exit_code()
            self._folder.cleanup()

    def _exit_code(self) -> int:
        assert self._pid is not None
        pid, self._pid, self._ready = self._pid, None, False
        self._pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def rows(self, question: Question, where: str = "", timeout_s: float = TIMEOUT_S) -> Rows:
        """What a query gives. where: `advantage.sql: my.sql`, with which an error begins.

        Raises UsageError (exit 2) for what is no query, condition or time, ResourceError (exit 7) over a
        limit of memory or time, CorruptError (exit 6) for a damaged file.
        """
        if not _is_time(timeout_s):
            raise UsageError(f"timeout_s {timeout_s}: expected seconds, more than 0 and finite")
        reply = self._ask(question, where, timeout_s)
        path = Path(reply["file"])
        reader = pa.ipc.open_file(pa.OSFile(str(path)))
        files.remove_file(path)  # it is open
        schema = reader.schema
        for at in reply["whole"]:
            schema = schema.set(at, schema.field(at).with_type(pa.int64()))
        numbers = range(reader.num_record_batches)
        return Rows(schema, (_cast(reader.get_batch(number), schema) for number in numbers))

    def columns(self, question: Question, where: str = "") -> list[str]:
        """The columns that it would give; nothing is computed. UsageError (exit 2) for no query."""
        found: list[str] = self._ask(replace(question, rows=0), where, TIMEOUT_S)["columns"]
        return found

    def _ask(self, question: Question, where: str, timeout_s: float) -> dict[str, Any]:
        prefix = f"{where}: " if where else ""
        answered = False
        if self._pid is None:
            self._start()
        try:
            if not self._ready:
                self._reply(_START_S, prefix)
                self._ready = True
            self._send(question)
            reply = self._reply(timeout_s, prefix)
            answered = True
        finally:
            if not answered:  # over a limit, or a signal: the query ends with whoever waits for it
                self.close()
        if "error" in reply:
            message, kind = reply["message"], getattr(errors, reply["error"])
            raise kind(f"{prefix}{message}" if message.startswith("query: ") else message)
        return reply

    def _send(self, question: Question) -> None:
        request = to_json(question, Path(self._folder.name))
        with suppress(BrokenPipeError):  # it has ended: the reply says so
            self._pipe.send_bytes(request)

    def _reply(self, timeout_s: float, prefix: str) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while not self._pipe.poll(min(_LOOK_S, max(0.0, end - time.monotonic()))):
            self._stop()
            if time.monotonic() >= end:
                limit = f"query: stopped after its limit of {timeout_s:g} s"
                raise ResourceError(f"{prefix}{limit}; {_CONFIGURED if prefix else _MORE_TIME}")
        try:
            reply: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._raise_why_it_ended(prefix)
        return reply

    def _raise_why_it_ended(self, prefix: str) -> NoReturn:
        code = self._exit_code()
        said = Path(self._folder.name, _LOG).read_text()
        self._folder.cleanup()
        if code == ResourceError.exit_code:
            limit = f"needs more memory than its limit of {child.PROCESS_GIB:g} GiB"
            raise ResourceError(f"{prefix}query: {limit}; {_LESS}")
        if code < 0:  # as the system does where memory is short
            raise ResourceError(f"{prefix}query: its process was ended by signal {-code}; {_LESS}")
        raise RuntimeError(said)


def _may_fork() -> bool:
    """Whether a copy of this process is a safe start: it does one thing only. A new one takes 0.4 s."""
    have_threads = {"torch", "obstore"} & sys.modules.keys()  # of their own, which Python does not count
    return sys.platform == "linux" and threading.active_count() == 1 and not have_threads


def _is_time(value: Any) -> bool:
    """Whether a value is seconds that can be waited for; NaN is none."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(0 < value <= threading.TIMEOUT_MAX)


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Whole numbers that DuckDB gives as decimals, as integers."""
    return batch if batch.schema.equals(schema) else batch.cast(schema)
