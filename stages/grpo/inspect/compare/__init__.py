"""compare: two rewards over the same rollouts, or two runs: what to look at before changing either."""

from typing import Any

from grpo.artifacts import names_run, run_names
from grpo.errors import UsageError
from grpo.inspect.compare import rewards, runs
from grpo.inspect.compare.page import print_comparison
from grpo.inspect.show.choice import Opened, rewards_of

__all__ = ["describe", "print_comparison"]


def describe(a: str, b: str, name: str, opened: Opened, wanted: str, num_examples: int) -> dict[str, Any]:
    """What `grpo compare` finds, as plain data: of rewards or of runs, whichever A and B name.

    `name`: of the run whose rewards are meant, "" where it was not given; `opened` then opens that of the
    configuration. Raises UsageError (exit 2), which lists the rewards and the runs that are there, where A
    and B are both, neither, or one of each; else as the describe() of either.
    """
    if a == b:
        raise UsageError(f"{a} {b}: cannot compare a thing with itself; give two rewards or two runs")
    names = run_names()
    are_runs = not name and names_run(a) and names_run(b)
    try:
        run = opened(name)
    except UsageError:  # no configuration here, or its run is not begun: no rewards are meant
        if not are_runs:
            raise
        return runs.describe(opened(a), opened(b), wanted)
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
    if are_rewards:
        return rewards.describe(run, a, b, wanted, num_examples)
    return runs.describe(opened(a), opened(b), wanted)
