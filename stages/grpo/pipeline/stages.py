"""pipeline: the four stages in their order, and how one of them is done.

`grpo run` and the stage commands take the same path through `perform`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from grpo.advantage import stage as advantage
from grpo.artifacts import Manifest, Plan, Run, Staging, choose_attempt, prune, require_space
from grpo.evaluate import stage as evaluation
from grpo.generate import stage as generate
from grpo.score import stage as score
from grpo.update import stage as update


@dataclass(frozen=True)
class Stage:
    """A stage as the runner sees it; the functions are those of its stage.py."""

    name: str
    output: str
    plan: Callable[[Run, int], Plan]
    open_tool: Callable[[Run], AbstractContextManager[Any]]
    run: Callable[[Run, int, Staging, Any], Manifest]
    release: Callable[[Any], None]


STAGES = tuple(
    Stage(module.NAME, module.OUTPUT, module.plan, module.open_tool, module.run, module.release)
    for module in (generate, score, advantage, update)
)
# No stage of the four, but done in the same way: with the tools of two of them, so it opens none.
EVALUATE = Stage(
    evaluation.NAME,
    evaluation.OUTPUT,
    evaluation.plan,
    lambda _: nullcontext(),
    evaluation.run,
    lambda _: None,
)


class Tools:
    """What is slow to set up, opened when a stage first needs it and kept until the end."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._working: Stage | None = None

    def __enter__(self) -> "Tools":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, stage: Stage) -> Any:
        """The stage's tool. That of the stage before leaves the accelerator first: they take turns."""
        if self._working is not None and self._working is not stage:
            self._working.release(self._open[self._working.name])
        self._working = stage
        return self._opened(stage)

    def borrow(self, name: str, beside: bool = False) -> Any:
        """The tool of the stage called `name`. beside: the one that works may stay where it is."""
        [stage] = [stage for stage in STAGES if stage.name == name]
        return self._opened(stage) if beside else self.get(stage)

    def _opened(self, stage: Stage) -> Any:
        if stage.name not in self._open:
            self._open[stage.name] = self._stack.enter_context(stage.open_tool(self._run))
        return self._open[stage.name]


def perform(
    run: Run, stage: Stage, iteration: int, tools: Tools, force: bool = False, only_failed: bool = False
) -> Manifest:
    """Bring one stage of one iteration up to date: do it, finish it, or find that nothing is to be done.

    force: anew, whatever is there; only_failed: anew for the rows that failed.
    """
    plan = stage.plan(run, iteration)
    committed = run.manifest(stage.output, iteration)
    attempt = choose_attempt(run, plan, committed, force, only_failed)
    if committed is not None and committed.fingerprint == plan.fingerprint(attempt):
        return committed
    require_space(run, stage.output, iteration)
    tool = tools.borrow if stage is EVALUATE else tools.get(stage)
    manifest = stage.run(run, iteration, Staging(run, plan, attempt, only_failed), tool)
    if stage.output == update.OUTPUT:
        prune(run)
    return manifest
