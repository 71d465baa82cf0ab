"""protocol: what a pool asks of workers, wherever they run."""

from collections.abc import Collection
from typing import Any, Protocol


class WorkerDied(Exception):
    """A worker ended before it answered; how, in a few words."""


class NoPlace(Exception):
    """A worker could not be started: there is no room for it; what it needs, in a few words."""


class Worker(Protocol):
    """Does one job at a time. What a job is, and its answer, is between whoever asks and what opened it."""

    def submit(self, job: Any) -> None:
        """Begin a job; the one before has been answered."""

    def result(self) -> Any:
        """The answer. Raises what the job raised, WorkerDied, and NoPlace."""

    def is_waiting(self) -> bool:
        """Whether it has been without a place for so long that an idle one should have its job."""

    def kill(self) -> None:
        """End it now, whatever it does."""


class Backend(Protocol):
    """A place where workers run."""

    @property
    def host(self) -> str:
        """The address of this machine for workers."""

    def start(self) -> Worker:
        """A new one, which opens what it needs with its first job."""

    def wait(self, busy: Collection[Worker], timeout_s: float) -> list[Worker]:
        """Those of `busy` that have answered or died, as soon as there is one; none after timeout_s."""

    def room(self, most: int) -> int:
        """How many of `most` more workers would have a place now."""

    def is_one_machine(self) -> bool:
        """Whether all workers see the files of this machine."""

    def close(self) -> None:
        """Leave the place; all workers have ended."""
