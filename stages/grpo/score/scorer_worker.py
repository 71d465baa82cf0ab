"""scorer_worker: reward functions called in a process of its own: a shard's calls -> outcomes.

The process knows nothing of the run. Around the processes in which functions are called, with their time-outs
and their deaths, it is what a command without `execution.scorers` is itself.
"""

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from grpo.config import RewardConfig
from grpo.errors import UsageError
from grpo.score.functions.call import GroupCall
from grpo.score.functions.modules import Modules
from grpo.score.functions.pool import FunctionPool
from grpo.score.functions.source import find_file, source_sha256
from grpo.score.functions.workspace import Workspace
from grpo.score.outcome import Outcome

_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class ScorerSettings:
    """What is the same for all jobs. num_workers: processes of a scorer in which functions are called.

    folder, threads: the driver's present folder and its OMP_NUM_THREADS, as functions would find them there.
    """

    num_workers: int
    folder: Path
    threads: str | None

    @classmethod
    def of_driver(cls, num_workers: int) -> "ScorerSettings":
        """Those of a driver that is this process."""
        return cls(num_workers, Path.cwd(), os.environ.get(_THREADS))


class ScoringJob(NamedTuple):
    """A function, and its calls over one shard; source: sha256 of its file, as planned ("": built in)."""

    reward: RewardConfig
    source: str
    modules: Modules
    calls: list[GroupCall]


class ScoringResult(NamedTuple):
    """The outcome of each rollout, in order; said: the lines that the function printed."""

    outcomes: list[Outcome]
    said: list[str]


class Scorer:
    """Does such jobs, until close(). Its processes start with the first call."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._num_workers = settings.num_workers
        self._said: list[str] = []
        self._open: tuple[str, Path, FunctionPool, Workspace] | None = None

    def __call__(self, job: ScoringJob) -> ScoringResult:
        """Score. Raises as FunctionPool.score(), and UsageError (exit 2) where the function is another."""
        root, pool, workspace = self._opened(job.modules)
        self._check_source(job, root)
        outcomes = list(chain.from_iterable(pool.score(job.reward, job.calls)))
        workspace.drain()
        said, self._said[:] = [*self._said], []
        return ScoringResult(outcomes, said)

    def close(self) -> None:
        """End the processes, busy or not."""
        if self._open is not None:
            self._open[2].close()
        self._open = None

    def _opened(self, modules: Modules) -> tuple[Path, FunctionPool, Workspace]:
        if self._open is None or self._open[0] != modules.digest:
            self.close()
            workspace = Workspace(self._said.append, guarded=True)
            root = modules.arrive(workspace)
            self._open = modules.digest, root, FunctionPool(root, self._num_workers, workspace), workspace
        return self._open[1:]

    def _check_source(self, job: ScoringJob, root: Path) -> None:
        function = str(job.reward.function)
        if source_sha256(function, root) != job.source:
            raise UsageError(
                f"reward function {function!r}: on {platform.node()} {find_file(function, root)} is not the"
                " file that the driver planned with; the same everywhere, and unchanged meanwhile, is right"
            )


def open_scorer(settings: ScorerSettings) -> Scorer:
    """One in this process, as the driver would be."""
    os.environ.pop(_THREADS, None)  # Ray sets its own
    if settings.threads is not None:
        os.environ[_THREADS] = settings.threads
    with suppress(OSError):  # of another machine, where no function reads by a relative path either
        os.chdir(settings.folder)
    return Scorer(settings)


def opener(settings: ScorerSettings) -> Callable[[], Scorer]:
    """open_scorer() of these settings, as a pool takes it."""
    return partial(open_scorer, settings)
