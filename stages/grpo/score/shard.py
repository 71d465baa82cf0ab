"""shard: one reward over one shard of rollouts, and what an earlier output holds of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Run
from grpo.config import RewardConfig


@dataclass(frozen=True)
class Work:
    """What is to be scored: the rollouts of an iteration, or others that are nobody's training data."""

    table: str
    """`rewards`, or another of the same columns."""
    prefix: str
    """What the names of its files begin with."""
    iteration: int
    rollouts: list[tuple[FileRecord, Path]]
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
    rollouts: FileRecord
    path: Path
    unit: str
    asked: str
    old: FileRecord | None
    old_answers: FileRecord | None


def rows_of(run: Run, file: FileRecord, path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one committed file, verified."""
    run.verify(file, path)
    data = tables.decode(str(file.table), [(path, path.read_bytes())], columns)
    rows: list[dict[str, Any]] = data.to_pylist()
    return rows
