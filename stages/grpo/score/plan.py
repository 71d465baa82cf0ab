"""score, planned: what the rewards of an iteration depend on."""

from collections.abc import Collection
from hashlib import sha256
from typing import Any

from grpo.artifacts import ActiveRun, Plan, keep_source
from grpo.config import RewardConfig
from grpo.config.score import TRANSPORT
from grpo.errors import InputError
from grpo.models.find import model_path
from grpo.score.functions.source import find_file, source_sha256
from grpo.score.judge.rubric import rubric_of

NAME = "score"
OUTPUT = "rewards"
STAGE_VERSION = 1  # a part of the digest of every shard too, so another makes every reward be computed anew


def plan(run: ActiveRun, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when the rollouts are missing."""
    run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    references = (f"rollouts@{iteration}", "prompts")
    teachers = {teacher.name: {"model": teacher.model} for teacher in run.config.score.teachers}
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"score": {"rewards": described(run), **({"teachers": teachers} if teachers else {})}},
        inputs={reference: run.id_of(reference) or "" for reference in references},
        user_files={**user_files_of(run), **teacher_files_of(run)},
    )


def described(run: ActiveRun) -> dict[str, Any]:
    """Every reward as configured, by name."""
    return {reward.name: configured(reward, {"name"}) for reward in run.config.score.rewards}


def user_files_of(run: ActiveRun) -> dict[str, str]:
    """What computes each reward, as part of a plan. UsageError (exit 2), InputError (4) for none."""
    rewards = run.config.score.rewards
    return run.once(
        "score.rewards", lambda: {f"score.rewards.{reward.name}": _source(run, reward) for reward in rewards}
    )


def teacher_files_of(run: ActiveRun) -> dict[str, str]:
    """The id of each teacher's checkpoint, as part of a plan. Raises InputError (exit 4) for none."""
    paths = {each.name: model_path(run, each.model).absolute() for each in run.config.score.teachers}
    return {f"score.teachers.{name}": run.checkpoint_id(str(path)) for name, path in paths.items()}


def _source(run: ActiveRun, reward: RewardConfig) -> str:
    """sha256 of the function's file (empty: built in) or of the rubric's text; the id of a reward model."""
    if reward.function is not None:
        return source_sha256(reward.function, run.imports)
    if reward.judge is not None:
        return sha256(rubric_of(reward, run.imports).encode()).hexdigest()
    return run.checkpoint_id(str(reward.model))


def require_source(run: ActiveRun, reward: RewardConfig, planned: str) -> None:
    """Raise InputError (exit 4) where a function's file or a rubric is not what was planned with any more.

    A reward model is not looked at again: it is in memory.
    """
    if reward.model is None and _source(run, reward) != planned:
        what = "file" if reward.judge is None else "rubric"
        raise InputError(
            f"score.rewards: {reward.name}: its {what} changed while the command was at work; run it again;"
            " what is committed was scored with the one before"
        )


def keep_sources(run: ActiveRun, user_files: dict[str, str]) -> None:
    """Keep in the run what computes its rewards, as planned: functions' files, and rubrics of judges."""
    for reward in run.config.score.rewards:
        digest = user_files[f"score.rewards.{reward.name}"]
        if reward.function is not None and (file := find_file(reward.function, run.imports)) is not None:
            keep_source(run, digest, file.name, file.read_bytes)
        elif reward.judge is not None:
            keep_source(run, digest, "rubric.txt", rubric_of(reward, run.imports).encode)


def configured(reward: RewardConfig, without: set[str], of_judge: Collection[str] = ()) -> dict[str, Any]:
    """The configuration of a reward as part of a fingerprint. of_judge: what of a judge's own is left out."""
    judge: Any = {*TRANSPORT, *of_judge} if reward.judge is not None else True
    return reward.recorded({**dict.fromkeys(without, True), "judge": judge})
