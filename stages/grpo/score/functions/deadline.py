"""deadline: a time-out for work in our own process, where nothing can interrupt what hangs in C or on a GPU.

So it ends the process. What is committed stays, and the same command goes on from there.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from grpo.console import report_error
from grpo.errors import EngineError


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """End the process with `message` and exit code 8 when the block takes longer than `seconds`."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(message: str) -> None:
    report_error(message, EngineError.exit_code)
    os._exit(EngineError.exit_code)
