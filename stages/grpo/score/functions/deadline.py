"""deadline: a time-out for work in our own process, where nothing can interrupt what hangs in C or on a GPU.

So the error is raised in a thread beside it, and whoever owns the process (cli/entry.py) ends it with that.
What is committed stays, and the same command resumes from there.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from grpo.errors import EngineError


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """Raise EngineError (exit 8) in a thread when the block takes longer than `seconds`."""

    def end() -> None:
        raise EngineError(message)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
