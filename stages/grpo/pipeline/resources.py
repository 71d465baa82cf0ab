"""resources: what the stages keep open between iterations, and whose turn it is on the accelerator."""

from contextlib import ExitStack
from typing import Any

from grpo.artifacts import ActiveRun, is_durable, newest_policy
from grpo.pipeline.stages import BY_NAME, UPDATE, Stage


class Resources:
    """Opened when a stage first needs them, and kept until the end."""

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._working: Stage | None = None

    def __enter__(self) -> "Resources":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, stage: Stage) -> Any:
        """What a stage works with: its own resource, or this object's borrow() where it borrows."""
        return self.borrow if stage.borrows else self._turn_of(stage)

    def borrow(self, name: str, beside: bool = False) -> Any:
        """The resource of the stage called `name`. beside: the stage that works may stay where it is."""
        stage = BY_NAME[name]
        return self._opened(stage) if beside else self._turn_of(stage)

    def keep_newest(self) -> None:
        """Have the newest policy on disk, rebuilt where it must be: a command that was killed may lack it."""
        newest = newest_policy(self._run)
        if not is_durable(self._run, newest):
            self.borrow(UPDATE.name).make_durable(newest)

    def _turn_of(self, stage: Stage) -> Any:
        """That of the stage before leaves the accelerator first: they take turns."""
        if self._working is not None and self._working is not stage:
            self._working.load().release(self._open[self._working.name])
        self._working = stage
        return self._opened(stage)

    def _opened(self, stage: Stage) -> Any:
        if stage.name not in self._open:
            if UPDATE.name in self._open:  # an engine that opens, on a GPU, allows no other work there
                self._open[UPDATE.name].settle()
            self._open[stage.name] = self._stack.enter_context(stage.load().open_resource(self._run))
        return self._open[stage.name]
