"""metrics: the numbers of iterations, by the columns of the view `iterations`, which defines them.

A manifest keeps some numbers of its rows, so that a line per iteration opens no table; a test holds them
equal to the view. Where it has none, as one of an earlier version, the view is asked.
"""

from collections.abc import Iterable
from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun, Run
from grpo.pipeline.stages import STAGES

# By output: column -> its key in the summary of the manifest.
_KEPT = {
    "rollouts": {
        "tokens": "response_tokens",
        "response_tokens": "mean_response_tokens",
        "truncated": "truncated_fraction",
        "policy_lag": "policy_lag",
    },
    "advantages": {"reward": "reward_mean"},
    "update": {"kl": "kl_mean", "entropy": "entropy_mean", "mismatch_mean": "mismatch_mean"},
}
_COLUMNS = [column for columns in _KEPT.values() for column in columns]
Numbers = dict[str, Any]


def row_of(run: ActiveRun, iteration: int) -> Numbers:
    """The row of the view. Reads the tables of this iteration and no other."""
    with sql.connect([run], iteration) as connection:
        [row] = sql.rows(connection, "sql/views/iterations")
    return row


def kept_of(run: ActiveRun, iterations: Iterable[int]) -> dict[int, Numbers]:
    """By iteration the columns of _KEPT; null where there is nothing yet."""
    found: dict[int, Numbers] = {}
    older: set[int] = set()
    for iteration in iterations:
        found[iteration] = dict.fromkeys(_COLUMNS)
        for output, columns in _KEPT.items():
            if manifest := run.manifest(output, iteration):
                found[iteration] |= {column: manifest.summary.get(key) for column, key in columns.items()}
                if not manifest.summary.keys() >= set(columns.values()):
                    older.add(iteration)
    if older:
        statement = f"select iteration, {', '.join(_COLUMNS)} from iterations"
        rows = sql.read([run], statement, iteration=min(older) if len(older) == 1 else None).to_pylist()
        found |= {row["iteration"]: row for row in rows if row["iteration"] in older}
    return found


def times_of(run: Run, iteration: int) -> Numbers:
    """`seconds`, and `stage_seconds` with null for a stage that was not timed."""
    timed = {stage.name: run.timings(stage.output, iteration) for stage in STAGES}
    seconds = {name: sum(parts.values()) if parts else None for name, parts in timed.items()}
    known = [value for value in seconds.values() if value is not None]
    return {"seconds": sum(known) if known else None, "stage_seconds": seconds}
