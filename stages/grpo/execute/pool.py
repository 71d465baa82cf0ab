"""pool: jobs -> results, by workers that may die. A dead worker costs time, never data.

A job is a function of what it holds alone, so it may be done twice, and by whichever worker is free.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

from grpo.errors import EngineError
from grpo.execute.protocol import Backend, Worker, WorkerDied

MOST_DEATHS = 3  # of workers, by which a job is set aside
POLL_S = 0.5  # how often it is looked whether to stop; an answer is seen at once


class Pool:
    """`count` workers, started as jobs need them and kept until close()."""

    def __init__(self, backend: Backend, count: int) -> None:
        self._backend, self._count = backend, count
        self._idle: list[Worker] = []
        self._busy: dict[Worker, str] = {}
        self._has_answered = False  # whether any worker ever has

    def run(
        self, jobs: Mapping[str, Any], what: str, stop_requested: Callable[[], None]
    ) -> Generator[tuple[str, Any], None, None]:
        """Name and result of each job, as they come.

        what: of which jobs errors speak, such as `generate 3`. A job whose worker dies is done again, first
        of all. Raises at once what a job raised, and when the others are done EngineError (exit 8) for those
        that ended MOST_DEATHS workers each.
        """
        waiting, deaths, aside = deque(jobs), Counter[str](), list[str]()
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self._count:
                    self._begin(name := waiting.popleft(), jobs[name])
                for worker in self._backend.wait(self._busy, POLL_S):
                    name = self._busy.pop(worker)
                    try:
                        result = self._answer_of(worker)
                    except WorkerDied as death:
                        deaths[name] += 1
                        if deaths[name] < MOST_DEATHS:
                            waiting.appendleft(name)
                        else:
                            aside.append(f"{name} ({death})")
                        continue
                    yield name, result
                if aside and not self._has_answered:  # all would die
                    break
                stop_requested()
        finally:
            self._end(list(self._busy))  # their answers are for nobody
        if aside:
            raise EngineError(
                f"{what}: {', '.join(aside)} ended {MOST_DEATHS} workers, one after the other; what else was"
                " to be done is committed, and the same command tries these again"
            )

    def close(self) -> None:
        """End all workers."""
        self._end([*self._idle, *self._busy])
        self._idle = []

    def _begin(self, name: str, job: Any) -> None:
        worker = self._idle.pop() if self._idle else self._backend.start()
        self._busy[worker] = name
        worker.submit(job)

    def _answer_of(self, worker: Worker) -> Any:
        """The worker is idle then, or ended where it has none. Raises as Worker.result()."""
        try:
            result = worker.result()
            self._idle.append(worker)
        finally:
            if worker not in self._idle:
                worker.kill()
        self._has_answered = True
        return result

    def _end(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._busy.pop(worker, None)
