"""shard: one reward over one shard of rollouts, and what an earlier output holds of it."""

from dataclasses import dataclass
from typing import Any

from grpo import tables
from grpo.artifacts import FileRecord, Run
from grpo.config import RewardConfig

OUTPUT = "rewards"


@dataclass(frozen=True)
class Shard:
    """One reward over one shard of rollouts, the `index`-th shard of the output.

    unit: digest of all that its values depend on; asked: of all that a judge's answers depend on. old,
    old_answers: the shards of an earlier output that have the same.
    """

    iteration: int
    index: int
    reward: RewardConfig
    rollouts: FileRecord
    unit: str
    asked: str
    old: FileRecord | None
    old_answers: FileRecord | None


def rows_of(
    run: Run, output: str, file: FileRecord, iteration: int, columns: list[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of one committed file of an output, verified."""
    assert file.table is not None
    path = run.path_of(file, output, iteration)
    run.verify(file, path)
    data = tables.decode(file.table, [(path, path.read_bytes())], columns)
    rows: list[dict[str, Any]] = data.to_pylist()
    return rows
