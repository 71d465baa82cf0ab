"""answering: what a worker's process does with a job, wherever it runs."""

import threading
import traceback
from collections.abc import Callable
from typing import Any

from grpo.errors import GrpoError

Open = Callable[[], Callable[[Any], Any]]
"""What a worker calls before its first job; it gives what does the jobs.

It must be importable by name. What it gives may have a close().
"""


class Answering:
    """job -> (True, result), or (False, what was raised): an error is told to the driver, never lost here."""

    def __init__(self, open_worker: Open) -> None:
        self._open = open_worker
        self._work: Callable[[Any], Any] | None = None
        self._closing = threading.Lock()

    def __call__(self, job: Any) -> tuple[bool, Any]:
        """Open with the first job, and do it."""
        try:
            self._work = self._work or self._open()
            return True, self._work(job)
        except GrpoError as error:
            return False, error
        except Exception:  # noqa: BLE001 - a bug of ours: the driver raises it, where it can be read
            return False, RuntimeError(traceback.format_exc())

    def close(self) -> None:
        """Close what was opened, once, whoever asks for it; a second one waits until it is."""
        with self._closing:
            work, self._work = self._work, None
            if work is not None and hasattr(work, "close"):
                work.close()
