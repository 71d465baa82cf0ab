"""compare: two rewards over the same rollouts, or two runs: what to look at before changing either."""

from typing import Any

from grpo.artifacts import ActiveRun, run_names
from grpo.console import stdout_console
from grpo.errors import UsageError
from grpo.inspect.compare import page, rewards, runs
from grpo.inspect.show.choice import Opened, rewards_of

__all__ = ["choose", "describe", "print_comparison"]


def choose(a: str, b: str, name: str, opened: Opened) -> list[ActiveRun]:
    """The two runs that A and B are, or the one run whose rewards they are: by what is there.

    `name`: of the run whose rewards are meant, "" where it was not given. `opened` opens a run by its name,
    "" for that of the configuration. Raises UsageError (exit 2), which lists the rewards and the runs that
    are there, where A and B are both, neither, or one of each.
    """
    if a == b:
        raise UsageError(f"{a} {b}: cannot compare a thing with itself; give two rewards or two runs")
    names = run_names()
    are_runs = not name and {a, b} <= {*names}
    try:
        run = opened(name)
    except UsageError:
        if not are_runs:
            raise
        return [opened(a), opened(b)]  # no configuration here, or its run is not begun: no rewards are meant
    known = sorted({reward for number in run.iterations() for reward in rewards_of(run, number)})
    are_rewards = {a, b} <= {*known, rewards.SUM}
    if are_runs == are_rewards:
        wrong = "expected two rewards or two runs"
        if are_runs:
            wrong = "names of rewards and of runs; --run NAME says that the rewards of that run are meant"
        if rewards.SUM not in known:
            known.append(f"{rewards.SUM} (their weighted sum)")
        there = f"rewards of {run.name}: {', '.join(known)}; runs: {', '.join(names) or 'none'}"
        raise UsageError(f"{a} {b}: {wrong}; {there}")
    return [run] if are_rewards else [opened(a), opened(b)]


def describe(chosen: list[ActiveRun], a: str, b: str, wanted: str, num_examples: int) -> dict[str, Any]:
    """What `grpo compare` finds in what choose() gave, as plain data; errors as of either describe()."""
    if len(chosen) == 1:
        return {"compared": "rewards", **rewards.describe(chosen[0], a, b, wanted, num_examples)}
    return {"compared": "runs", **runs.describe(chosen[0], chosen[1], wanted)}


def print_comparison(data: dict[str, Any]) -> None:
    """Print what describe() returned."""
    printed = page.print_rewards if data["compared"] == "rewards" else page.print_runs
    printed(stdout_console(), data)
