"""pool: reward functions + groups -> outcomes, each call in a process, which may hang, crash, be killed.

Time is kept three times. A watchdog in the worker (faulthandler: a C thread, which no code that holds the
interpreter lock can stop) starts behind the import; a worker that was stopped as a whole, or that ended
itself with status 0, is found out here; pebble's clock, with the import, is the last line.
"""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from grpo.config import RewardConfig
from grpo.errors import EngineError, UsageError
from grpo.score.functions import worker
from grpo.score.functions.call import GroupCall, find_problem
from grpo.score.functions.source import find_file, source_sha256
from grpo.score.functions.workspace import Workspace, is_alive
from grpo.score.outcome import Outcome, one_line

IMPORT_TIMEOUT_S = 120.0  # of the first import of a function's module; a cold torch takes tens of seconds
SPARE_S = 5.0  # what pebble's clock allows beyond the time-out and three times the measured import
CALLS_PER_WORKER = 2  # in flight: one running and one waiting, so that memory stays bounded
MAX_RESTARTS = 3  # of the pool for one call: a worker that dies between calls breaks the pool, nothing else
POLL_S = 0.5  # how often a broken pool is looked for; a result is seen at once
GRACE_S = 1.0  # that a worker has to end, or its result to arrive, before it is missed


class FunctionPool:
    """Worker processes for reward functions: they start at the first call and live until close().

    import_root comes first on their sys.path. Calls come from one thread. workspace: closed with the pool;
    None: one that shows on stderr what they print.
    """

    def __init__(self, import_root: Path, num_workers: int, workspace: Workspace | None = None) -> None:
        self._import_root = import_root.resolve()
        self._num_workers = num_workers
        self._workspace = workspace or Workspace()
        self._calls, self._is_closed = count(), False
        self._sources: dict[str, str] = {}  # function -> sha256 of its file, as the workers know it
        self._import_s: dict[str, float] = {}
        self._pool = self._open()

    def check(
        self, reward: RewardConfig, columns: Collection[str] | None = None, empty: Collection[str] = ()
    ) -> None:
        """Import the function in a worker. Raises UsageError saying what is wrong with it or its arguments.

        columns: the data set's column names; without them, keywords that the function needs go unchecked.
        empty: those that have no value in any row (scorers.empty_columns).
        """
        function = str(reward.function)
        file, source = find_file(function, self._import_root), source_sha256(function, self._import_root)
        if self._sources.get(function, source) != source:
            self._restart()
        what, started = (function, reward.arguments, file, columns, empty), time.perf_counter()
        try:
            problem = self._result(self._start(find_problem, what, IMPORT_TIMEOUT_S))
        except TimeoutError:
            limit = f"within {IMPORT_TIMEOUT_S:g} s"
            problem = f"the import of its module did not end {limit}, or ended the process with status 0"
        except ProcessExpired as error:
            problem = f"the import of its module ended the process ({_ending(error.exitcode)})"
        if problem is not None:
            raise UsageError(f"reward function {function!r}: {problem}")
        self._sources[function] = source
        known_s = self._import_s.get(function, 0.0)  # the worker of now may have imported it before
        self._import_s[function] = max(known_s, time.perf_counter() - started)

    def score(self, reward: RewardConfig, groups: Iterable[GroupCall]) -> Iterator[list[Outcome]]:
        """Yield the outcomes of each group, in order; a bad rollout is an outcome, never an exception.

        A call that fails as a whole (raises, hangs, crashes, wrong count) is repeated rollout by rollout, so
        a function whose values depend on the rest of the group then sees each rollout alone. Raises
        UsageError as check() does, and EngineError when no worker can be started.
        """
        function = str(reward.function)
        self._workspace.reset_output_limit()
        if self._sources.get(function) != source_sha256(function, self._import_root):
            self.check(reward)
        remaining = iter(groups)
        waiting: deque[tuple[GroupCall, _Flight]] = deque()
        try:
            while True:
                for group in islice(remaining, CALLS_PER_WORKER * self._num_workers - len(waiting)):
                    waiting.append((group, self._start_group(reward, group)))
                if not waiting:
                    return
                yield self._outcomes(reward, *waiting.popleft())
        finally:
            for _, flight in waiting:
                flight.future.cancel()

    def close(self) -> None:
        """End the workers, busy or not, and what they started. It may come from another thread than calls."""
        self._is_closed = True
        self._stop()
        self._workspace.close()

    def _outcomes(self, reward: RewardConfig, group: GroupCall, flight: "_Flight") -> list[Outcome]:
        result = self._group_result(reward, flight)
        if isinstance(result, list):
            return result
        if len(group.completions) == 1:
            return [result]
        alone = [group.alone(sample) for sample in range(len(group.completions))]
        flights = [self._start_group(reward, each) for each in alone]
        return [self._outcomes(reward, *pair)[0] for pair in zip(alone, flights, strict=True)]

    def _group_result(self, reward: RewardConfig, flight: "_Flight") -> list[Outcome] | Outcome:
        late = f"no result within {reward.timeout_s:g} s"
        try:
            result: list[Outcome] | Outcome = self._result(flight, reward.timeout_s)
        except TimeoutError:  # pebble's: the call never began
            result = Outcome(None, "error", f"{late}: the import of its module hung, or ended the process")
        except (ProcessExpired, _Lost) as error:
            if traces := self._workspace.trace(flight.name):
                result = Outcome(None, "timeout", one_line(f"{late} (in {worker.where_it_hung(traces)})"))
            elif isinstance(error, _Lost) and error.late:
                result = Outcome(None, "timeout", f"{late} (its process was stopped)")
            else:
                ending = "exit status 0" if isinstance(error, _Lost) else _ending(error.exitcode)
                result = Outcome(None, "error", f"the process ended during the call ({ending})")
        self._workspace.forget(flight.name)
        if isinstance(result, Outcome):
            self._workspace.end_groups()
        return result

    def _start_group(self, reward: RewardConfig, group: GroupCall) -> "_Flight":
        function, name = str(reward.function), f"{next(self._calls)}.call"
        args = (str(self._workspace.folder / name), function, reward.arguments, reward.timeout_s, group)
        limit_s = reward.timeout_s + SPARE_S + 3 * self._import_s[function]
        return self._start(worker.score, args, limit_s, name)

    def _start(
        self, function: Callable[..., Any], args: tuple[Any, ...], limit_s: float, name: str = ""
    ) -> "_Flight":
        if not self._pool.active:
            self._restart()
        future = self._pool.schedule(function, args, timeout=limit_s)
        return _Flight((function, args, limit_s, name), self._pool, future)

    def _result(self, flight: "_Flight", timeout_s: float = math.inf) -> Any:
        """Wait for a call. Raises TimeoutError, ProcessExpired, _Lost, and EngineError when the pool keeps
        breaking.

        pebble gives a whole pool up when a worker dies outside a call. Calls it had not yet sent to a worker
        then never end, so they are started again in a new pool.
        """
        for _ in range(MAX_RESTARTS + 1):
            while flight.pool.active and not flight.future.done():
                wait([flight.future], timeout=POLL_S)
                if not flight.future.done():
                    self._raise_if_lost(flight, timeout_s)
            if flight.future.done() and not isinstance(flight.future.exception(), BrokenProcessPool):
                return flight.future.result()
            flight = self._start(*flight.call)
        raise EngineError(
            f"the reward workers ended {MAX_RESTARTS + 1} times before any result; their output is above "
            '(a script that starts them needs `if __name__ == "__main__":`)'
        )

    def _raise_if_lost(self, flight: "_Flight", timeout_s: float) -> None:
        """Raise _Lost for a call that is over, and of which pebble does not know."""
        begun = self._workspace.started(flight.name) if flight.name else None
        if begun is None:
            return
        pid, began = begun
        late = time.monotonic() > began + timeout_s + GRACE_S
        if late:  # stopped, with its watchdog
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif is_alive(pid):
            return
        wait([flight.future], timeout=GRACE_S)  # what pebble knows by then is more exact
        if late or not flight.future.done():
            flight.future.cancel()
            raise _Lost(late)

    def _open(self) -> ProcessPool:
        # spawn: a fork of a process that has threads (torch, pyarrow) can deadlock.
        return ProcessPool(
            max_workers=self._num_workers,
            initializer=worker.start,
            initargs=(str(self._import_root), str(self._workspace.folder)),
            context=get_context("spawn"),
        )

    def _restart(self) -> None:
        if self._is_closed:
            raise EngineError("the reward workers were ended")
        self._stop()
        self._pool = self._open()

    def _stop(self) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()
        self._workspace.end_groups()


class _Lost(Exception):
    """The worker of a call ended itself with status 0, or was stopped. late: the time was over."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late


class _Flight(NamedTuple):
    """A call under way, with what is needed to start it again; the last of that is its name."""

    call: tuple[Callable[..., Any], tuple[Any, ...], float, str]
    pool: ProcessPool
    future: "Future[Any]"

    @property
    def name(self) -> str:
        """Of its note in the workspace; empty where it has none."""
        return self.call[3]


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exit status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
