"""processes: workers in processes of this machine.

A process that is started anew, not a fork: this one has threads. It ends with the driver, however that ends.
"""

import os
import signal
import threading
from collections.abc import Collection
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from grpo.execute.answering import Answering, Open
from grpo.execute.protocol import Worker, WorkerDied


class LocalProcesses:
    """Of this machine, all alike. open_worker: of each.

    grace_s: in which one that is to end may close what it has open; 0: it is killed at once.
    """

    host = "127.0.0.1"

    def __init__(self, open_worker: Open, grace_s: float = 0.0) -> None:
        self._open, self._grace_s = open_worker, grace_s

    def start(self) -> "Process":
        """A new one."""
        return Process(self._open, self._grace_s)

    def wait(self, busy: Collection[Worker], timeout_s: float) -> list[Worker]:
        """Those of `busy` that have answered or died."""
        of_connection: dict[Any, Worker] = {each.answers: each for each in busy if isinstance(each, Process)}
        return [of_connection[each] for each in connection.wait(list(of_connection), timeout_s)]

    def room(self, most: int) -> int:
        """There is always a place."""
        return most

    def is_one_machine(self) -> bool:
        """It is this one."""
        return True

    def close(self) -> None:
        """There is nothing to leave."""


class Process:
    """One of them."""

    def __init__(self, open_worker: Open, grace_s: float = 0.0) -> None:
        self._grace_s = grace_s
        context = get_context("spawn")
        self.answers, theirs = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(theirs, lifeline, open_worker))
        self._process.start()
        self.pid = self._process.pid
        self._sending: threading.Thread | None = None
        theirs.close()
        lifeline.close()

    def submit(self, job: Any) -> None:
        """Begin a job; a large one fills the pipe until the process, which may be starting, has read it."""
        content = ForkingPickler.dumps(job)
        self._sending = threading.Thread(target=self._send, args=(content,), daemon=True)
        self._sending.start()

    def _send(self, content: Any) -> None:
        with suppress(OSError):  # it has died: result() says so
            self.answers.send_bytes(content)

    def result(self) -> Any:
        """The answer."""
        try:
            is_right, found = self.answers.recv()
        except (EOFError, OSError):  # the second, where it died within an answer
            self._process.join()
            raise WorkerDied(_ending(self._process.exitcode)) from None
        if is_right:
            return found
        raise found

    def is_waiting(self) -> bool:
        """There is always a place."""
        return False

    def kill(self) -> None:
        """End it now."""
        self._lifeline.close()
        if self._grace_s:
            self._process.join(self._grace_s)
        self._process.kill()
        self._process.join()
        if self._sending is not None:
            self._sending.join()  # nobody reads it any more, which ends it
        self.answers.close()


def _work(jobs: Connection, lifeline: Connection, open_worker: Open) -> None:
    """Do jobs until there are no more to come."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a whole process group: for the driver, which ends this one
    answering = Answering(open_worker)
    threading.Thread(target=_end_with, args=(lifeline, answering), daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        while True:
            jobs.send(answering(jobs.recv()))
    answering.close()


def _end_with(lifeline: Connection, answering: Answering) -> None:
    """End this process with the one that holds the other end."""
    try:
        with suppress(EOFError, OSError):
            lifeline.recv_bytes()
        answering.close()
    finally:
        os._exit(1)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"by {signal.Signals(-exit_code).name}"
    return f"with exit status {exit_code}"
