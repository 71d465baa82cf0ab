"""compare: two rewards over the same rollouts, or two runs: what to look at before changing either."""

from typing import Any

from grpo.inspect.compare import reward_page, rewards, run_page, runs
from grpo.inspect.compare.subjects import Subjects, choose

__all__ = ["Subjects", "choose", "describe", "print_comparison"]


def describe(subjects: Subjects, a: str, b: str, wanted: str, num_examples: int) -> dict[str, Any]:
    """What `grpo compare` found, as plain data; errors as those of rewards.describe and runs.describe."""
    if subjects.kind == "rewards":
        return {"compared": "rewards", **rewards.describe(subjects.runs[0], a, b, wanted, num_examples)}
    one, other = subjects.runs
    return {"compared": "runs", **runs.describe(one, other, wanted)}


def print_comparison(data: dict[str, Any]) -> None:
    """Print what describe() returned."""
    reward_page.print_rewards(data) if data["compared"] == "rewards" else run_page.print_runs(data)
