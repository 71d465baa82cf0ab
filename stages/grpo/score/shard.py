"""shard: one reward over one shard of rollouts, what an earlier output holds of it, and its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Run, Staging, digest
from grpo.config import RewardConfig
from grpo.config.score import READING
from grpo.score.judge.completion import Judgement
from grpo.score.outcome import Key, Outcome
from grpo.score.plan import STAGE_VERSION, configured

REPEATED = "repeated"  # label of a shard: which rollouts failed again as before, and under which timeout_s
_Found = TypeVar("_Found", Outcome, Judgement)


class File(NamedTuple):
    """A committed file of rows, and where it is."""

    record: FileRecord
    path: Path


class ScoringTask(NamedTuple):
    """What is to be scored: the rollouts of an iteration, or those that a policy is evaluated by.

    rollouts: shards, committed or staged with what is scored; prefix: of the names of the files of `table`.
    """

    staging: Staging
    table: str  # rewards, or eval_rewards
    answers_table: str  # judgements, or eval_judgements
    prefix: str
    iteration: int
    rollouts: list[File]
    prompts_id: str


class Shard:
    """One reward over one shard of rollouts, the `index`-th shard of the output.

    source: of what computes it, as planned (plan.user_files_of).
    unit: digest of all that its values depend on; asked: of all that a judge's answers depend on. old,
    old_answers: the shards of the `earlier` output that have the same, its own before those of another name.
    """

    def __init__(
        self, task: ScoringTask, reward: RewardConfig, rollouts: File, earlier: Manifest | None, index: int
    ) -> None:
        staging = task.staging
        self.task, self.reward, self.rollouts, self.index = task, reward, rollouts, index
        self.name = staging.file_name(task.prefix, index)
        self.answers_name = staging.file_name(task.answers_table, index)
        self.title = f"{staging.plan.stage} {task.iteration} {reward.name}"
        apart = {"name", "weight", "timeout_s", "on_timeout"}  # what no value that was found depends on
        self.source = staging.plan.user_files[f"score.rewards.{reward.name}"]
        known = [self.source, rollouts.record.sha256, task.prompts_id]
        self.unit = digest([STAGE_VERSION, configured(reward, apart, {"rubric"}), *known])
        self.asked = digest([STAGE_VERSION, configured(reward, apart, {"rubric", *READING}), *known])

        def held(table: str, unit: str) -> File | None:
            files = [file for file in (earlier.files if earlier else []) if file.unit == unit]
            found = [file for file in files if file.table == table]
            found.sort(key=lambda file: file.labels["reward"] != reward.name)
            path_of = staging.run.path_of
            return File(found[0], path_of(found[0], staging.plan.output, task.iteration)) if found else None

        self.old = held(task.table, self.unit)
        self.old_answers = held(task.answers_table, self.asked)

    @property
    def num_rollouts(self) -> int:
        """Rows of the shard."""
        return self.rollouts.record.rows or 0

    def settled(self) -> set[Key]:
        """The rollouts that failed twice in the same way, in no less time: tried again only when asked."""
        found = self.old.record.labels.get(REPEATED) if self.old is not None else None
        if found is None or self.task.staging.only_failed or self.reward.timeout_s > found["timeout_s"]:
            return set()
        return {(group, sample) for group, sample in found["rollouts"]}


def staged(staging: Staging, records: list[FileRecord], table: str) -> list[File]:
    """Those of a table among the files of an output that is not committed yet."""
    return [File(record, staging.folder / record.name) for record in records if record.table == table]


def read(run: Run, table: str, files: Sequence[File], columns: list[str] | None = None) -> pa.Table:
    """The rows of files, verified."""
    for file in files:
        run.verify(file.record, file.path)
    return tables.decode(table, ((file.path, file.path.read_bytes()) for file in files), columns)


def found_in(run: Run, file: File, kind: type[_Found]) -> dict[Key, _Found]:
    """What the rows of a file say of each rollout."""
    return {
        (row["group_id"], row["sample_id"]): kind(**{name: row[name] for name in kind._fields})
        for row in read(run, str(file.record.table), [file]).to_pylist()
    }


def table_of(shard: Shard, table: str, found: Mapping[Key, Outcome] | Mapping[Key, Judgement]) -> pa.Table:
    """The rows that say so: from_pylist() takes of each what the table has a column for."""
    reward = shard.reward
    of_all = {"iteration": shard.task.iteration, "name": reward.name, "weight": reward.weight}
    rows = [
        {**of_all, "group_id": group, "sample_id": sample, **each._asdict()}
        for (group, sample), each in found.items()
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema(table))
