"""outputs: what an update leaves: tables, next policy, optimiser state, and the policy's weight check."""

from typing import Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import ActiveRun, FileRecord, Run, Staging
from grpo.errors import EngineError
from grpo.models.weight_check import FILE, measure, read_weight_check
from grpo.update.adapter import adapter_files
from grpo.update.batch import Rollouts
from grpo.update.checkpoint import OPTIMIZER_FILE, optimizer_file, policy_files
from grpo.update.learner import Learner
from grpo.update.objective import Stored

ROWS_PER_SHARD = 2048  # of `logprobs`, one Parquet file and row group each


def write_updates(rows: list[dict[str, Any]], staging: Staging) -> FileRecord:
    """Commit the rows of `updates`."""
    updates = pa.Table.from_pylist(rows, schema=tables.schema("updates"))
    return staging.write_table("updates", staging.file_name("updates", 0), updates)


def write_logprobs(iteration: int, rollouts: Rollouts, stored: Stored, staging: Staging) -> list[FileRecord]:
    """The shards of `logprobs`, in key order; one without rows where nothing was read."""
    read = sorted(stored.first_step)
    starts = range(0, max(len(read), 1), ROWS_PER_SHARD)
    return [
        staging.write_table(
            "logprobs",
            staging.file_name("logprobs", shard),
            _logprobs(iteration, rollouts, stored, read[start : start + ROWS_PER_SHARD]),
        )
        for shard, start in enumerate(starts)
    ]


def _logprobs(iteration: int, rollouts: Rollouts, stored: Stored, read: list[int]) -> pa.Table:
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


def write_checkpoint(
    run: ActiveRun, learner: Learner, staging: Staging
) -> tuple[list[FileRecord], list[FileRecord], FileRecord]:
    """The policy, the adapter where one trains, and the optimiser state."""
    policy = [
        staging.write_bytes("policy", name, content)
        for name, content in policy_files(learner.model, run.policy_folder(0), learner.adapter)
    ]
    files = adapter_files(learner.adapter) if learner.adapter is not None else ()
    adapter = [staging.write_bytes("adapter", name, content) for name, content in files]
    moments = optimizer_file(learner.optimizer, learner.model)
    return policy, adapter, staging.write_bytes("optimizer", OPTIMIZER_FILE, moments)


def write_weight_check(run: Run, learner: Learner, staging: Staging) -> FileRecord:
    """Check the new policy with the sequences of the starting one's weight check.

    Raises EngineError (exit 8) when it has no finite log-probs: then the steps have ruined it.
    """
    check = measure(learner.network.reader, read_weight_check(run.weight_check_path(0)).sequences)
    if not check.is_finite():
        raise EngineError(
            "update: the log-probs of the new policy are not finite; lower update.learning_rate or"
            " update.weight_decay; nothing was committed"
        )
    return staging.write_bytes("policy", FILE, check.encode())


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
