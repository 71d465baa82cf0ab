"""stages: the four stages in their order, evaluate beside them, and how one of them is done.

`grpo run` and the stage commands take the same path through `perform`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from grpo.advantage import plan as advantage
from grpo.artifacts import (
    ActiveRun,
    Manifest,
    Plan,
    Product,
    Staging,
    can_be_had,
    choose_attempt,
    is_durable,
    newest_policy,
    require_space,
)
from grpo.evaluate import plan as evaluate
from grpo.generate import plan as generate
from grpo.score import plan as score
from grpo.update import plan as update

if TYPE_CHECKING:
    from grpo.pipeline.resources import Resources


class StageModule(Protocol):
    """The heavy half of a stage, its stage.py: imported when the stage is opened, for that may take seconds.

    Parameters are passed by position. A resource is what is slow to set up and kept between iterations.
    """

    def check(self, run: ActiveRun, until: int, resources: Any, /) -> None:
        """Raise now what iterations before `until` would fail with, as far as it can be known."""

    def open_resource(self, run: ActiveRun, lend: Any, /) -> AbstractContextManager[Any]:
        """The stage's resource, until the end of the run; lend: gives policies to an engine."""

    def produce(self, run: ActiveRun, iteration: int, staging: Staging, resource: Any, /) -> Product:
        """Make the output of one iteration, shard by shard; what is committed of it already is kept."""

    def release(self, resource: Any, /) -> None:
        """Leave the accelerator to the next stage."""

    def after(self, run: ActiveRun, manifest: Manifest, resource: Any, /) -> None:
        """What follows from a commit: raise for rows that failed, drop what is no longer kept."""


if TYPE_CHECKING:  # each of them is one
    from grpo.advantage import stage as _advantage
    from grpo.evaluate import stage as _evaluate
    from grpo.generate import stage as _generate
    from grpo.score import stage as _score
    from grpo.update import stage as _update

    _MODULES: tuple[StageModule, ...] = (_generate, _score, _advantage, _update, _evaluate)


@dataclass(frozen=True)
class Stage:
    """A stage as the runner sees it. The light half is in its plan.py, the heavy one in its stage.py."""

    name: str
    output: str
    plan: Callable[[ActiveRun, int], Plan]
    load: Callable[[], StageModule]
    borrows: bool = False
    """Whether it works with the resources of other stages instead of one of its own."""


def _stage(plan: Any, borrows: bool = False) -> Stage:
    def load() -> StageModule:
        return cast(StageModule, import_module(f"grpo.{plan.NAME}.stage"))

    return Stage(plan.NAME, plan.OUTPUT, plan.plan, load, borrows)


STAGES = tuple(_stage(plan) for plan in (generate, score, advantage, update))
GENERATE, SCORE, ADVANTAGE, UPDATE = STAGES
EVALUATE = _stage(evaluate, borrows=True)  # none of the four, but done in the same way
BY_NAME = {stage.name: stage for stage in STAGES}


def perform(
    run: ActiveRun,
    stage: Stage,
    iteration: int,
    resources: "Resources",
    force: bool = False,
    only_failed: bool = False,
) -> Manifest:
    """Bring one stage of one iteration up to date: do it, finish it, or find that nothing is to be done.

    force: rerun, whatever is there; only_failed: rerun for the rows that failed.
    """

    def work() -> Manifest:
        staging = open_staging(run, stage, iteration, resources, force, only_failed)
        if isinstance(staging, Manifest):
            return staging
        return make(run, stage, staging, resources.get(stage))

    return resources.despite_losses(work)


def open_staging(
    run: ActiveRun,
    stage: Stage,
    iteration: int,
    resources: "Resources",
    force: bool = False,
    only_failed: bool = False,
) -> Staging | Manifest:
    """Where an output is to be made, or made whole; the committed one where nothing is to be done."""
    if run.mirror is not None:
        run.mirror.check()
    plan = stage.plan(run, iteration)
    committed = run.manifest(stage.output, iteration)
    attempt = choose_attempt(run, plan, committed, force, only_failed)
    if committed is not None and committed.fingerprint == plan.fingerprint(attempt):
        return committed
    if committed is not None:
        _keep_newest(run, stage, iteration, resources)
    require_space(run, stage.output, iteration)
    return Staging(run, plan, attempt, only_failed)


def _keep_newest(run: ActiveRun, stage: Stage, iteration: int, resources: "Resources") -> None:
    """Before an output is replaced that later policies came from: have the newest of them on disk.

    Unless the result is the same, those between can be rebuilt no more.
    """
    is_read = stage in (GENERATE, ADVANTAGE, UPDATE) or (stage is SCORE and run.config.score.teachers)
    newest = newest_policy(run)
    if is_read and newest > iteration and not is_durable(run, newest) and can_be_had(run, newest):
        run.console.say(
            f"{stage.name} {iteration}: policy {newest} came from what is replaced: it is written"
        )
        resources.keep_newest()


def make(run: ActiveRun, stage: Stage, staging: Staging, resource: Any) -> Manifest:
    """Make the output that `staging` was opened for, and commit it: a stage only makes it."""
    assert staging.plan.iteration is not None
    work = stage.load()
    manifest = staging.commit(work.produce(run, staging.plan.iteration, staging, resource))
    work.after(run, manifest, resource)
    return manifest
