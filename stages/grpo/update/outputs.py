"""outputs: what an update leaves: its tables, and the weight check of the policy that it made."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import ActiveRun, FileRecord, Run, Staging
from grpo.errors import EngineError
from grpo.models.weight_check import FILE, read_weight_check
from grpo.update.batch import Rollouts
from grpo.update.learner import Learner
from grpo.update.objective import Stored

ROWS_PER_SHARD = 2048  # of `logprobs`, one Parquet file and row group each
IDS = ("updates", "logprobs")  # what others may read by its id, beside the policy


def write_outputs(
    run: ActiveRun,
    iteration: int,
    rows: list[dict[str, Any]],
    rollouts: Rollouts,
    stored: Stored,
    learner: Learner,
    staging: Staging,
) -> dict[str, list[FileRecord]]:
    """Write the files of an update, by what they hold.

    `logprobs` is in key order, a shard without rows where nothing was read. Raises EngineError (exit 8) when
    the new policy has no finite log-probs: then the steps have ruined it.
    """

    def shards(table: str, data: Iterable[pa.Table]) -> list[FileRecord]:
        return [staging.write_table(table, staging.file_name(table, n), each) for n, each in enumerate(data)]

    read = sorted(stored.first_step)
    starts = range(0, max(len(read), 1), ROWS_PER_SHARD)
    parts = (logprobs_table(iteration, rollouts, stored, read[n : n + ROWS_PER_SHARD]) for n in starts)
    return {
        "updates": shards("updates", [updates_table(run, rows)]),
        "logprobs": shards("logprobs", parts),
        "weight_check": [staging.write_bytes("", FILE, _weight_check(run, learner))],
    }


def updates_table(run: ActiveRun, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `updates`, with the optional columns of those keys alone that are configured."""
    config = run.config.update
    keys = (config.off_policy_mask, config.top_entropy, config.entropy_target)
    optional = zip(tables.OPTIONAL["updates"], keys, strict=True)
    schema = tables.schema("updates", without=[name for name, key in optional if key is None])
    return pa.Table.from_pylist(rows, schema=schema)


def logprobs_table(iteration: int, rollouts: Rollouts, stored: Stored, read: list[int]) -> pa.Table:
    """Rows of `logprobs`, of the rollouts whose places are in `read`."""
    gaps = [
        float(np.abs(stored.policy[i].astype(np.float64) - rollouts.old_logprobs[i]).mean()) for i in read
    ]
    columns = {
        **{name: rollouts.keys[read, position] for position, name in enumerate(tables.KEY)},
        "update_iteration": [iteration] * len(read),
        "step": [stored.first_step[i] for i in read],
        "policy_logprobs": [stored.policy[i] for i in read],
        "reference_logprobs": [stored.reference.get(i) for i in read],
        "mismatch": gaps,
    }
    return pa.table(columns, schema=tables.schema("logprobs"))


def _weight_check(run: Run, learner: Learner) -> bytes:
    """The new policy's log-probs of the sequences of the starting one's weight check."""
    check = learner.measure(read_weight_check(run.weight_check_path(0)).sequences)
    if not check.is_finite():
        raise EngineError(
            "update: the log-probs of the new policy are not finite; lower update.learning_rate or"
            " update.weight_decay; nothing was committed"
        )
    return check.encode()


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns of `iterations` that `grpo status` shows: of the steps taken, weighted by tokens."""
    taken = [row for row in rows if not row["skipped"]]
    tokens = sum(row["tokens"] for row in taken)

    def mean(name: str) -> float | None:
        known = [row[name] * (row["tokens"] / tokens) for row in taken if row.get(name) is not None]
        return sum(known) if known else None

    return {
        "kl_mean": mean("kl"),
        "entropy_mean": mean("entropy"),
        "mismatch_mean": next((row.get("mismatch_mean") for row in taken), None),
        "steps": len(rows),
        "skipped": len(rows) - len(taken),
    }
