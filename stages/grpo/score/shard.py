"""shard: one reward over one shard of rollouts, and what an earlier output holds of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Run, Staging, digest
from grpo.config import RewardConfig
from grpo.config.score import READING
from grpo.score.plan import STAGE_VERSION, configured


class File(NamedTuple):
    """A committed file of rows, and where it is."""

    record: FileRecord
    path: Path


@dataclass(frozen=True)
class Work:
    """What is to be scored: the rollouts of an iteration, or those that a policy is evaluated by."""

    table: str
    """rewards, or eval_rewards."""
    answers_table: str
    """judgements, or eval_judgements."""
    prefix: str
    """What the names of the files of `table` begin with."""
    iteration: int
    rollouts: list[File]
    """Shards of rollouts, and where they are: committed, or staged with what is scored."""
    prompts_id: str
    before: Manifest | None
    """The output that this one replaces: what it holds already is not computed again."""


@dataclass(frozen=True)
class Shard:
    """One reward over one shard of rollouts, the `index`-th shard of the output.

    unit: digest of all that its values depend on; asked: of all that a judge's answers depend on. old,
    old_answers: the shards of an earlier output that have the same.
    """

    work: Work
    index: int
    reward: RewardConfig
    rollouts: File
    unit: str
    asked: str
    old: File | None
    old_answers: File | None

    def name(self, staging: Staging) -> str:
        """The file of its rewards."""
        return staging.file_name(self.work.prefix, self.index)

    def answers_name(self, staging: Staging) -> str:
        """The file of what a judge answered."""
        return staging.file_name(self.work.answers_table, self.index)


def shard_of(
    staging: Staging,
    work: Work,
    reward: RewardConfig,
    rollouts: File,
    earlier: Manifest | None,
    index: int,
) -> Shard:
    """earlier: the output whose rows may be kept."""
    apart = {"name", "weight", "timeout_s"}  # what no value depends on
    source = staging.plan.user_files[f"score.rewards.{reward.name}"]
    read = [source, rollouts.record.sha256, work.prompts_id]
    where = {"rubric"} if reward.judge is not None else set()  # its text is the source
    unit = digest([STAGE_VERSION, configured(reward, apart, where), *read])
    asked = digest([STAGE_VERSION, configured(reward, apart, {*where, *READING}), *read])
    held = earlier.files if earlier else []
    old = [file for file in held if file.table == work.table and file.unit == unit]
    answers = [file for file in held if file.table == work.answers_table and file.unit == asked]
    answers.sort(key=lambda file: file.labels["reward"] != reward.name)  # its own first

    def first(found: list[FileRecord]) -> File | None:
        path = staging.run.path_of(found[0], staging.plan.output, work.iteration) if found else None
        return None if path is None else File(found[0], path)

    return Shard(
        work=work,
        index=index,
        reward=reward,
        rollouts=rollouts,
        unit=unit,
        asked=asked,
        old=first(old),
        old_answers=first(answers),
    )


def rows_of(run: Run, file: File, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one committed file, verified."""
    run.verify(file.record, file.path)
    data = tables.decode(str(file.record.table), [(file.path, file.path.read_bytes())], columns)
    rows: list[dict[str, Any]] = data.to_pylist()
    return rows
