"""artifacts.writer: one thread that writes beside other work; where it failed, the next wait says so."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """At most one task at a time. What it reads must rest until wait() has returned."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._task: Future[None] | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Begin `task`, once the one before has ended; raises what that one raised."""
        self.wait()
        self._task = self._pool.submit(task)

    def wait(self) -> None:
        """Return when nothing is being written; raises once what the last task raised."""
        task = self._task
        try:
            if task is not None:
                task.result()
        finally:
            if task is not None and task.done():  # a signal may have ended the waiting alone
                self._task = None

    def close(self) -> None:
        """End the thread, when its task has ended; nothing is raised."""
        self._pool.shutdown(wait=True)
