"""compare.subjects: whether A and B are two rewards of a run or two runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from grpo.artifacts import ActiveRun, Run, run_names
from grpo.errors import UsageError

SUM = "reward"  # the weighted sum of the rewards, a column of `advantages`


@dataclass(frozen=True)
class Subjects:
    """What is compared: two runs, or two rewards of one run."""

    kind: Literal["runs", "rewards"]
    runs: list[ActiveRun]


def choose(a: str, b: str, name: str, opened: Callable[[str], ActiveRun]) -> Subjects:
    """Decide by what is there. `name`: of the run whose rewards are meant, "" where it was not given.

    `opened` opens a run by its name, "" for that of the configuration. Raises UsageError (exit 2), which
    lists the rewards and the runs that are there, where A and B are both, neither, or one of each.
    """
    if a == b:
        raise UsageError(f"{a} {b}: cannot compare a thing with itself; give two rewards or two runs")
    runs = run_names()
    are_runs = not name and {a, b} <= set(runs)
    if are_runs and not _has_own_run(opened):
        return Subjects("runs", [opened(a), opened(b)])
    run = opened(name)
    rewards = reward_names(run)
    are_rewards = {a, b} <= {*rewards, SUM}
    if are_runs == are_rewards:
        wrong = (
            "names of rewards and of runs; --run NAME says that the rewards of that run are meant"
            if are_runs
            else "expected two rewards or two runs"
        )
        raise UsageError(f"{a} {b}: {wrong}; {_there(run, rewards, runs)}")
    return Subjects("runs", [opened(a), opened(b)]) if are_runs else Subjects("rewards", [run])


def reward_names(run: Run) -> list[str]:
    """Names of the rewards that any iteration holds, from the manifests."""
    manifests = (run.manifest("rewards", iteration) for iteration in run.iterations())
    names = {key for manifest in manifests if manifest for key in manifest.ids if key.startswith("reward/")}
    return sorted(name.removeprefix("reward/") for name in names)


def _has_own_run(opened: Callable[[str], ActiveRun]) -> bool:
    """Whether there is a run whose rewards may be meant without naming it."""
    try:
        opened("")
    except UsageError:  # no configuration here, or its run is not begun
        return False
    return True


def _there(run: Run, rewards: list[str], runs: list[str]) -> str:
    own = ", ".join([*rewards, *([] if SUM in rewards else [f"{SUM} (their weighted sum)"])])
    return f"rewards of {run.name}: {own}; runs: {', '.join(runs) or 'none'}"
