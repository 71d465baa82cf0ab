"""resources: what the stages keep open between iterations, and whose turn it is on the accelerator."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grpo.artifacts import POLICY, ActiveRun, held_part, is_durable, newest_policy
from grpo.errors import EngineError
from grpo.pipeline.stages import BY_NAME, UPDATE, Stage

if TYPE_CHECKING:
    from grpo.models.weights import Weights

MOST_LOSSES = 2
"""Of processes that train together, in one piece of work: what ended three of them would end the next."""
T = TypeVar("T")


class Resources:
    """Opened when a stage first needs them, and kept until the end."""

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._until: dict[str, ExitStack] = {}
        self._working: Stage | None = None

    def __enter__(self) -> "Resources":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)  # what is open may have something to save, and not after every failure

    def get(self, stage: Stage) -> Any:
        """What a stage works with: its own resource, or this object's borrow() where it borrows."""
        return self.borrow if stage.borrows else self._turn_of(stage)

    def borrow(self, name: str, beside: bool = False) -> Any:
        """The resource of the stage called `name`. beside: the stage that works may stay where it is."""
        stage = BY_NAME[name]
        return self._opened(stage) if beside else self._turn_of(stage)

    @contextmanager
    def lend(self, number: int) -> "Iterator[Path | Weights]":
        """Policy `number` for an engine: a whole one from disk, else the learner's own weights.

        Those it has in memory, else those of an adapter, or of a replay.
        """
        run = self._run
        policies: Any = self._open.get(UPDATE.name)
        held = None if policies is None else policies.learner.holds
        if held is None or held != run.id_of(f"policy@{number}"):
            if policies is not None:
                policies.flush()  # or what is read here may be dropped behind a newer one
            folder = held_part(run, number, POLICY) if number else run.start["policy"]
            if folder is not None:
                yield folder
                return
            policies = self._opened(UPDATE)
            policies.hold(number)
        try:
            yield policies.learner.lend(run.start["policy"])
        finally:
            policies.learner.release()

    def keep_newest(self) -> None:
        """Have the newest policy on disk, rebuilt where it must be: a command that was killed may lack it."""
        newest = newest_policy(self._run)
        if not is_durable(self._run, newest):
            self.despite_losses(lambda: self.borrow(UPDATE.name).make_durable(newest))

    def despite_losses(self, work: Callable[[], T]) -> T:
        """Do `work`, from its beginning again where a process that trains with this one is lost meanwhile.

        All of them end then, and others start as a learner is wanted; those of torchrun cannot. Raises what
        `work` raises, and EngineError (exit 8) the third time.
        """
        for left in reversed(range(MOST_LOSSES + 1)):
            try:
                return work()
            except EngineError as error:
                ranks = self._run.ranks
                if not left or ranks is None or not ranks.is_broken or not ranks.are_own:
                    raise
                self._run.console.say(f"{error}; all of them start again")
                del self._open[UPDATE.name]
                self._until.pop(UPDATE.name).__exit__(*sys.exc_info())
                self._working = None if self._working is UPDATE else self._working
        raise AssertionError("the last one returns or raises")

    def _turn_of(self, stage: Stage) -> Any:
        """That of the stage before leaves the accelerator first: they take turns."""
        if self._working is not None and self._working is not stage:
            self._working.load().release(self._open[self._working.name])
        self._working = stage
        return self._opened(stage)

    def _opened(self, stage: Stage) -> Any:
        if stage.name not in self._open:
            if UPDATE.name in self._open:  # an engine that opens, on a GPU, allows no other work there
                self._open[UPDATE.name].flush()
            until = self._until[stage.name] = self._stack.enter_context(ExitStack())
            self._open[stage.name] = until.enter_context(stage.load().open_resource(self._run, self.lend))
        return self._open[stage.name]
