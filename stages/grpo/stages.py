"""stages: one stage from Python, as the command of its name does it: `grpo.stages.score(run, iteration=3)`.

`target` is an open run, or a configuration; `overrides` are as `--set`. Each function returns a dict per
iteration: `iteration`, `done` (false: it was complete already), `rows`, `ids`. Errors are the commands'.
"""

from typing import Any

from grpo import api
from grpo.api import Configuration, Run, Settings
from grpo.errors import UsageError
from grpo.inspect import evaluations
from grpo.pipeline import work

Iteration = int | range | str | None
"""One, a range without gaps, "all", or None: the first where the stage is missing."""


def generate(
    target: Run | Configuration,
    iteration: Iteration = None,
    force: bool = False,
    overrides: Settings | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Stage 1: policy + prompts -> rollouts."""
    return _perform("generate", target, iteration, force, overrides, quiet)


def score(
    target: Run | Configuration,
    iteration: Iteration = None,
    force: bool = False,
    overrides: Settings | None = None,
    quiet: bool = False,
    only_failed: bool = False,
) -> list[dict[str, Any]]:
    """Stage 2: rollouts + prompts -> rewards. only_failed: rerun the rows that failed, and no others."""
    return _perform("score", target, iteration, force, overrides, quiet, only_failed)


def advantage(
    target: Run | Configuration,
    iteration: Iteration = None,
    force: bool = False,
    overrides: Settings | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Stage 3: rollouts + rewards -> advantages."""
    return _perform("advantage", target, iteration, force, overrides, quiet)


def update(
    target: Run | Configuration,
    iteration: Iteration = None,
    force: bool = False,
    overrides: Settings | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Stage 4: policy + rollouts + advantages -> next policy."""
    return _perform("update", target, iteration, force, overrides, quiet)


def evaluate(
    target: Run | Configuration,
    policy: int | None = None,
    force: bool = False,
    overrides: Settings | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure a policy, by default the newest, on held-out prompts: what `grpo evaluate --json` prints."""
    if policy is not None and not api.is_count(policy):
        raise UsageError(f"--policy {policy}: expected the number of a policy, 0 or more")
    with api.at_work(target, overrides, quiet) as active:
        number = work.evaluate(active, policy, force)
        return {"run": active.name, **evaluations.numbers_of(active, number)}


def _perform(
    name: str,
    target: Run | Configuration,
    iteration: Iteration,
    force: bool,
    overrides: Settings | None,
    quiet: bool,
    only_failed: bool = False,
) -> list[dict[str, Any]]:
    with api.at_work(target, overrides, quiet) as active:
        return work.run_stage(active, name, _wanted(iteration), force, only_failed)


def _wanted(iteration: Iteration) -> str:
    """As `--iteration` has it."""
    if iteration is None:
        return ""
    if not isinstance(iteration, range):
        return str(iteration)  # which is looked at as that of the command line is
    if not iteration or iteration.step != 1:
        raise UsageError(f"iteration: {iteration} has no iterations, or gaps; expected such as range(0, 20)")
    return f"{iteration[0]}-{iteration[-1]}"
