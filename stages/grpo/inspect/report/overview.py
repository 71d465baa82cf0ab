"""overview: a run as a whole: how much it did, what made it, and the pass rate of every prompt."""

import json
from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun, open_run
from grpo.config import differing_keys, flatten


def summary(connection: sql.Connection, run: ActiveRun) -> dict[str, Any]:
    """Counts, seconds, the configuration a run was created with, what changed since, and versions."""
    [counts] = sql.rows(connection, "inspect/report/summary", run=run.name)
    changed = sql.rows(connection, "inspect/report/config_changes", run=run.name)
    created = open_run(run.path)
    return {
        "run": run.name,
        "pass_reward": run.config.passing[0],
        **counts,
        "config": {key: json.dumps(value) for key, value in flatten(created.get("config", {})).items()},
        "changes": [
            f"iteration {row['iteration']}: {text}"
            for row in changed
            for text in differing_keys(json.loads(row["before"]), json.loads(row["config"]))
        ],
        "versions": created.get("versions", {}),
    }


def heat(connection: sql.Connection, run: ActiveRun) -> dict[str, Any]:
    """One cell for each prompt (its place in `prompts`) and iteration: its mean reward and its rollouts."""
    first = run.config.passing[0] or ""
    found = sql.rows(connection, "inspect/report/heat", run=run.name, first=first)
    return found[0] if found else {"prompts": [], "absent": "no reward was given in this run yet"}
