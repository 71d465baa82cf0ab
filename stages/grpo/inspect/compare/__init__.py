"""compare: two rewards over the same rollouts, or runs: what to look at before changing either."""

from typing import Any

from grpo.artifacts import find_run, find_runs, names_run, run_names
from grpo.errors import UsageError, listed
from grpo.inspect.compare import many, previous, rewards, runs
from grpo.inspect.compare.page import print_comparison
from grpo.inspect.show.choice import Opened, rewards_of

__all__ = ["describe", "print_comparison"]


def describe(given: list[str], name: str, opened: Opened, wanted: str, num_examples: int) -> dict[str, Any]:
    """What `grpo compare` finds, as plain data: of two rewards, or of two runs or more, whichever are named.

    `name`: of the run whose rewards are meant, "" where it was not given; `opened` then opens that of the
    configuration. Raises UsageError (exit 2), which lists the rewards and the runs that are there, where they
    are both, neither, or some of each; else as the describe() of either.
    """
    if len(set(given)) < len(given):
        raise UsageError(
            f"{' '.join(given)}: cannot compare a thing with itself; give two rewards or two runs"
        )
    things = given if name else [*dict.fromkeys(run for each in given for run in find_runs(each))]
    if len(things) < 2:
        raise UsageError(f"{' '.join(given)}: one thing alone; give two rewards, or two runs or more")
    are_runs = not name and all(map(names_run, things))
    if len(things) > 2 and not are_runs:
        none = [each for each in things if not names_run(each)] or things
        there = f"runs there: {listed(run_names(), none[0]) or 'none'}"
        raise UsageError(f"{' '.join(none)}: more than two things are runs, and some are none; {there}")
    try:
        run = opened(name)
    except UsageError:  # no configuration here, or its run is not begun: no rewards are meant
        if not are_runs:
            if not name and any(map(names_run, things)):  # then the one that is none is what is wrong
                list(map(find_run, things))
            raise
        return _runs(things, opened, wanted)
    known = sorted({reward for number in run.iterations() for reward in rewards_of(run, number)})
    of_rewards = {each.removesuffix(previous.SUFFIX) for each in things}
    are_rewards = of_rewards <= {*known, rewards.SUM}
    if are_runs == are_rewards:
        raise _unclear(things, run.name, known, are_runs)
    if are_rewards:
        return rewards.describe(run, things[0], things[1], wanted, num_examples)
    return _runs(things, opened, wanted)


def _runs(names: list[str], opened: Opened, wanted: str) -> dict[str, Any]:
    first, second, *more = found = [opened(name) for name in names]
    return many.describe(found, wanted) if more else runs.describe(first, second, wanted)


def _unclear(things: list[str], run: str, known: list[str], are_runs: bool) -> UsageError:
    """Things that are both runs and rewards, or neither; known: the rewards of the run."""
    wrong = "expected two rewards or two runs"
    if are_runs:
        wrong = "names of rewards and of runs; --run NAME says that the rewards of that run are meant"
    if rewards.SUM not in known:
        known = [*known, f"{rewards.SUM} (their weighted sum)"]
    there = f"rewards of {run}: {listed(known, things[0])}; runs: {listed(run_names(), things[0]) or 'none'}"
    return UsageError(f"{' '.join(things)}: {wrong}; {there}")
