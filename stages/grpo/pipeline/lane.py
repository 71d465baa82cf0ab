"""lane: rollouts that engines in other processes sample while this one scores and trains.

Sampling ahead (generate.policy_lag) needs only a policy that is there. What is committed, and its bytes, are
those of doing it in turn; only the clock is another.
"""

from typing import TYPE_CHECKING, Any

from grpo.artifacts import ActiveRun, Staging
from grpo.pipeline.resources import Resources
from grpo.pipeline.stages import EVALUATE, GENERATE, Stage, open_staging, perform

if TYPE_CHECKING:
    from grpo.generate.sampling import Sampled


class SampleLane:
    """One iteration's rollouts at a time. It is only there where engines are in other processes."""

    def __init__(self, run: ActiveRun, resources: Resources) -> None:
        self._run, self._resources = run, resources
        self._begun: tuple[int, Staging, Sampled] | None = None

    def __enter__(self) -> "SampleLane":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._begun is not None:
            self._begun[2].close()

    def without_begun(self, todo: list[tuple[Stage, int]], iteration: int) -> list[tuple[Stage, int]]:
        """Of what `iteration` has to do, what is to be begun: not rollouts of a later one that are."""
        begun = None if self._begun is None else (GENERATE, self._begun[0])
        return [each for each in todo if each != begun or each == (GENERATE, iteration)]

    def perform(self, stage: Stage, number: int, iteration: int) -> None:
        """Do a stage of iteration `number` as `iteration` comes to it; only begin rollouts of a later one."""
        if stage in (GENERATE, EVALUATE):  # the engines are wanted
            self._finish()
        execution = self._run.config.execution
        engines = None if execution is None else execution.engines
        if stage is GENERATE and number > iteration and engines is not None:
            self._resources.despite_losses(lambda: self._begin(number))
        else:
            perform(self._run, stage, number, self._resources)

    def _begin(self, iteration: int) -> None:
        from grpo.generate import stage as generate

        staging = open_staging(self._run, GENERATE, iteration, self._resources)
        assert isinstance(staging, Staging), "it was open, and nothing else works on it"
        sampler = self._resources.borrow(GENERATE.name, beside=True)
        self._begun = iteration, staging, generate.begin(self._run, iteration, staging, sampler)

    def _finish(self) -> None:
        """Commit what is being sampled, when all of it is there. Raises what went wrong meanwhile."""
        from grpo.generate import stage as generate

        if self._begun is None:
            return
        _, staging, sampled = self._begun
        staging.commit(generate.finish(sampled))
        self._begun = None
