"""artifacts.layout: what a run holds and where, in names."""

import re
from pathlib import Path

from grpo.errors import UsageError

STAGE_OUTPUTS = {"rollouts": "generate", "rewards": "score", "advantages": "advantage", "update": "update"}
"""Outputs of an iteration in order, and the stage that makes each."""
CHECKPOINT = "checkpoint"
"""Of a policy, beside the update that made it: weights and optimiser state, where they are on disk."""
EVALUATION = "evaluation"
OUTPUTS = {**STAGE_OUTPUTS, EVALUATION: "evaluate"}
"""All that `iteration=i` may hold: also what policy i was measured to be, which no stage reads."""
RUN_OUTPUTS = ("prompts", "policy", "eval_prompts")
"""Outputs of the run as a whole; the last only where `evaluate` is configured."""
TABLES_OF = {
    "rewards": ("rewards", "judgements", "teacher_logprobs"),
    "update": ("updates", "logprobs"),
    EVALUATION: ("eval_rollouts", "eval_rewards", "eval_judgements"),
}
"""Tables of an output that holds others than the one of its name."""


def iteration_folder(iteration: int) -> str:
    """`iteration=000003`: sorts as text, and reads as a Hive partition."""
    return f"iteration={iteration:06d}"


def iterations_in(folder: Path) -> list[int]:
    """Iterations that have a folder in `folder`, in order; other names are not ours."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name.partition("=")[2]) for path in paths if is_iteration(path.name))


def is_iteration(name: str) -> bool:
    """Whether a folder is called as that of an iteration is."""
    return re.fullmatch("iteration=[0-9]{6,9}", name) is not None


def holder_of(reference: str) -> tuple[str, int | None]:
    """The output that holds `name@iteration` or `name`, and its iteration.

    Policy i is of update i-1; the tables of update i are its own.
    """
    name, _, at = reference.partition("@")
    iteration = int(at) if at else None
    if name in ("prompts", "eval_prompts", "reference"):
        return ("policy" if name == "reference" else name), None
    if iteration is None:
        raise AssertionError(f"{name} belongs to an iteration")
    if name == "policy":
        return ("policy", None) if iteration == 0 else ("update", iteration - 1)
    if name in TABLES_OF["update"]:
        return "update", iteration
    return ("rewards" if name.startswith(("reward/", "teacher/")) else name), iteration


def policy_of(iteration: int, lag: int) -> int:
    """The policy that an iteration samples from, whatever the clock did; lag: generate.policy_lag."""
    return max(0, iteration - lag)


def parse_iterations(wanted: str) -> tuple[int, int] | None:
    """First and last of `3` or `0-19`; None for `all`. Raises UsageError (exit 2) for anything else."""
    if wanted == "all":
        return None
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", wanted)
    if not match:
        raise UsageError(f"--iteration {wanted}: expected a number such as 3, a range such as 0-19, or all")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise UsageError(f"--iteration {wanted}: ends before it begins; did you mean {last}-{first}?")
    return first, last
