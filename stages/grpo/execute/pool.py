"""pool: jobs -> results, by workers that may die. A dead worker costs time, never data.

A job is a function of what it holds alone, so it may be done twice, and by whichever worker is free.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from grpo.errors import EngineError, GrpoError, ResourceError
from grpo.execute.protocol import Backend, NoPlace, Worker, WorkerDied

MOST_DEATHS = 3  # of workers, by which a job is set aside
POLL_S = 0.5  # how often it is looked whether to stop; an answer is seen at once
SLOW = 2.0  # times the longest that any job took: then a worker that is free tries the same one


class Given(NamedTuple):
    """A job that a worker has, since when, as time.monotonic(); name "": its answer is for nobody."""

    name: str
    since: float


@dataclass
class Round:
    """Where one call of run() stands."""

    jobs: Mapping[str, Any]
    waiting: deque[str]
    may_start: bool
    done: set[str] = field(default_factory=set)
    deaths: Counter[str] = field(default_factory=Counter)
    aside: list[str] = field(default_factory=list)  # what is tried no more, and why
    longest_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether every job is done, or set aside."""
        return len(self.done) + len(self.aside) == len(self.jobs)


class Pool:
    """`count` workers, started as jobs need them and kept until close().

    copies: whether a job that takes long may be begun a second time; what is done first counts.
    timeout_s: of a job; a worker that has not answered then is killed.
    """

    def __init__(self, backend: Backend, count: int, copies: bool = True, timeout_s: float = 3600.0) -> None:
        self._backend, self.count = backend, count
        self._copies, self._timeout_s = copies, timeout_s
        self._places = count  # how many workers there may be: fewer, where the backend has no more room
        self._idle: list[Worker] = []
        self._busy: dict[Worker, Given] = {}
        self._has_answered = False  # whether any worker ever has

    @property
    def is_one_machine(self) -> bool:
        """Whether all workers see the files of this machine."""
        return self._backend.is_one_machine()

    def run(
        self,
        jobs: Mapping[str, Any],
        what: str,
        stop_requested: Callable[[], None],
        is_stopping: Callable[[], bool] = lambda: False,
        may_start: bool = True,
    ) -> Generator[tuple[str, Any], None, None]:
        """Name and result of each job, as they come.

        what: of which jobs errors speak, such as `generate 3`. A job whose worker dies is done again, first
        of all. is_stopping: once it says so, no job is begun, and it ends with those under way. may_start: a
        worker; else those work that are idle now, to which alone was given what the jobs need. Raises at once
        what a job raised, when the others are done EngineError (exit 8) for those that ended MOST_DEATHS
        workers each, and ResourceError (exit 7) where no worker got a place, or none is left.
        """
        now = Round(jobs, deque(jobs), may_start)
        self._look_for_room()
        try:
            while not now.is_over:
                if not is_stopping():
                    self._hand_out(now, what)
                elif not any(given.name in jobs for given in self._busy.values()):
                    break
                for worker in self._backend.wait(self._busy, POLL_S):
                    if (found := self._answer_of(now, worker, what)) is not None:
                        yield found
                self._end_overdue(now)
                if now.aside and not self._has_answered:  # all would die
                    break
                stop_requested()
        finally:
            self._leave(now)
        if now.aside:
            rest = "what else was to be done is committed"
            raise EngineError(
                f"{what}: {', '.join(now.aside)} ended {MOST_DEATHS} workers, one after the other;"
                f" {rest if self._has_answered else 'none has answered yet'}; the same command tries again"
            )

    @property
    def host(self) -> str:
        """The address of this machine for workers."""
        return self._backend.host

    @property
    def idle(self) -> tuple[Worker, ...]:
        """Those that are open and have no job."""
        return tuple(self._idle)

    def ask_all(self, jobs: Sequence[Any]) -> list[Any]:
        """The answers of all that are idle, each to the job at its place in `jobs`.

        Raises what one raised, and WorkerDied; all of them are ended then: the others stand in the midst of
        what they do together.
        """
        asked, self._idle, answers = self._idle, [], dict[Worker, Any]()
        for worker, job in zip(asked, jobs, strict=True):
            self._busy[worker] = Given("", time.monotonic())
            worker.submit(job)
        try:
            while left := [worker for worker in asked if worker not in answers]:
                for worker in self._backend.wait(left, POLL_S):
                    answers[worker] = worker.result()
                if any(time.monotonic() - self._busy[worker].since > self._timeout_s for worker in left):
                    raise WorkerDied(f"no answer in {self._timeout_s:g} s")
        finally:
            if len(answers) < len(asked):
                self._end(asked)
        self._idle = [worker for worker in asked if self._busy.pop(worker)]
        return [answers[worker] for worker in asked]

    def close(self) -> None:
        """End all workers."""
        self._end([*self._idle, *self._busy])
        self._idle = []
        self._backend.close()

    def _look_for_room(self) -> None:
        """Have as many workers as are wanted again where there is a place for them by now."""
        if self._places < self.count:
            alive = len(self._idle) + len(self._busy)
            self._places = max(1, alive + self._backend.room(self.count - alive))

    def _hand_out(self, now: Round, what: str) -> None:
        while now.waiting and len(self._busy) < self._places and (now.may_start or self._idle):
            self._begin(now, now.waiting.popleft())
        if now.waiting and not now.may_start and not self._busy:
            raise ResourceError(
                f"{what}: all workers have ended that had what it needs; what is committed is kept,"
                " and the same command continues"
            )
        for worker, held in list(self._busy.items()):
            is_wanted = held.name in now.jobs and held.name not in now.done
            if self._idle and is_wanted and worker.is_waiting():
                self._end([worker])
                self._places = max(1, len(self._idle) + len(self._busy))
                self._begin(now, held.name)
        if self._copies and self._idle and now.longest_s:
            given = Counter(job.name for job in self._busy.values())
            once = [job for job in self._busy.values() if given[job.name] == 1 and job.name not in now.done]
            if late := [job for job in once if self._is_late(now, job)]:
                self._begin(now, min(late, key=lambda job: job.since).name)

    def _is_late(self, now: Round, job: Given) -> bool:
        return job.name in now.jobs and time.monotonic() - job.since > max(SLOW * now.longest_s, POLL_S)

    def _begin(self, now: Round, name: str) -> None:
        worker = self._idle.pop() if self._idle else self._backend.start()
        self._busy[worker] = Given(name, time.monotonic())
        worker.submit(now.jobs[name])

    def _answer_of(self, now: Round, worker: Worker, what: str) -> tuple[str, Any] | None:
        """Name and result; None where the worker had none, or somebody else was first. Raises what it raised.

        The worker is idle then, or ended where it has none. What a job raises that nobody waits for is
        dropped: what it read may be gone by now.
        """
        given = self._busy.pop(worker)
        is_wanted = given.name in now.jobs and given.name not in now.done
        try:
            result = worker.result()
            self._idle.append(worker)
        except WorkerDied as death:
            self._again(now, given.name, str(death))
            return None
        except NoPlace as refusal:
            self._places -= 1
            now.waiting.extendleft({given.name} & now.jobs.keys())
            if not self._places:
                raise ResourceError(f"{what}: {refusal}; what is committed is kept") from None
            return None
        except (GrpoError, RuntimeError):  # the second: any other error there
            if is_wanted:
                raise
            return None
        finally:
            if worker not in self._idle:
                worker.kill()
        self._has_answered = True
        if not is_wanted:
            return None
        now.longest_s = max(now.longest_s, time.monotonic() - given.since)
        now.done.add(given.name)
        return given.name, result

    def _again(self, now: Round, name: str, how: str) -> None:
        """What to do about a job whose worker ended."""
        now.deaths[name] += 1
        if name not in now.jobs or name in now.done or name in [job.name for job in self._busy.values()]:
            return  # it is done, or another worker has it too
        if now.deaths[name] < MOST_DEATHS:
            now.waiting.appendleft(name)
        else:
            now.aside.append(f"{name} ({how})")

    def _end_overdue(self, now: Round) -> None:
        for worker, given in list(self._busy.items()):
            if time.monotonic() - given.since > self._timeout_s and not worker.is_waiting():
                self._end([worker])
                self._again(now, given.name, f"no answer in {self._timeout_s:g} s")

    def _leave(self, now: Round) -> None:
        """End whoever works on what nobody waits for; who was only too late may finish, and stays open."""
        for worker, given in list(self._busy.items()):
            if given.name in now.jobs and given.name not in now.done:
                self._end([worker])
            else:
                self._busy[worker] = given._replace(name="")

    def _end(self, workers: list[Worker]) -> None:
        if workers:
            with ThreadPoolExecutor(len(workers)) as threads:  # each may have time to close what it has open
                for _ in threads.map(lambda worker: worker.kill(), workers):
                    pass
        for worker in workers:
            self._busy.pop(worker, None)
