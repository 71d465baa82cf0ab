"""verify_replay: every update of a run made again from its tables, and held against what it left.

The strongest check there is: what is on disk is not only what was written, it is what follows from the rest.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo.artifacts import ActiveRun, newest_policy
from grpo.console import stdout_console
from grpo.errors import EngineError, InputError
from grpo.pipeline.prepare import find_start
from grpo.update.plan import OUTPUT
from grpo.update.policies import Policies, new_learner
from grpo.update.restore import Outcome
from grpo.update.world import together


@dataclass
class ReplayReport:
    """The updates that were made again, in order; the last is the only one that may not be accepted."""

    updates: int | None
    """Of the run; None: it is damaged, and nothing is replayed."""
    outcomes: list[Outcome] = field(default_factory=list)
    stopped: str = ""
    """Why it went no further: something is damaged, or an update was made from something else."""

    @property
    def equal(self) -> int:
        """Updates that gave the same bits."""
        return sum(not outcome.differing for outcome in self.outcomes)

    @property
    def refused(self) -> Outcome | None:
        """The first that is not what it left."""
        return next((outcome for outcome in self.outcomes if not outcome.accepted), None)

    @property
    def exit_code(self) -> int:
        """0, 8 where one is refused, or 4 where one cannot be replayed."""
        if self.stopped:
            return InputError.exit_code
        return EngineError.exit_code if self.refused else 0

    def describe(self) -> dict[str, Any]:
        """The report as plain data."""
        found = self.refused
        first = None
        if found is not None:
            first = {
                "iteration": found.iteration,
                "differing": found.differing,
                "mean_difference": found.mean if found.mean < float("inf") else None,
                "execution": found.execution,
            }
        return {
            "updates": self.updates,
            "replayed": len(self.outcomes),
            "equal": self.equal,
            "first_refused": first,
            "stopped": self.stopped or None,
        }


def not_replayed() -> ReplayReport:
    """Of a run that is damaged: what its updates were made from may be gone."""
    return ReplayReport(None, stopped="something is damaged")


def replay(run: ActiveRun) -> ReplayReport:
    """Make the updates of a run again, up to the first that differs.

    Raises as Policies.redo(), together() and find_start().
    """
    find_start(run)
    updates = sum(run.manifest(OUTPUT, number) is not None for number in run.iterations())
    report = ReplayReport(updates)
    with together(run), run.console.progress("replay", updates, "updates") as advance:
        policies = Policies(run, new_learner(run))
        for number in range(newest_policy(run)):
            manifest = run.require(OUTPUT, number, f"grpo update --iteration {number}")
            try:
                outcome = policies.redo(manifest)
            except InputError as error:
                report.stopped = str(error)
                break
            report.outcomes.append(outcome)
            advance(1)
            if not outcome.accepted:
                break
            run.console.stop_requested()
    return report


def print_replay(report: ReplayReport) -> None:
    """The report as a person reads it."""
    say = partial(stdout_console().print, soft_wrap=True)
    if report.updates is None:
        say(f"not replayed: {report.stopped}")
        return
    if found := report.refused:
        but = f"; its execution here: {', '.join(found.execution)}" if found.execution else ""
        what = f"{', '.join(found.differing)} are not what a replay gives"
        say(f"differs  update {found.iteration}: {what} (log-probs {found.mean:.1e} nats off){but}")
    if report.stopped:
        say(f"stopped  {report.stopped}")
    close = len(report.outcomes) - report.equal - bool(report.refused)
    count = f"{len(report.outcomes)} of {report.updates}"
    text = f", {close} as close as they promise" if close else ""
    say(f"replayed {count} updates from policy 0: {report.equal} byte-equal{text}")
