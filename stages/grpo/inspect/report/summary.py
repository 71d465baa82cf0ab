"""summary: what stands above the curves: how much a run did, how it was configured, what made it."""

import json
from typing import Any

from grpo import sql
from grpo.artifacts import Run, open_run
from grpo.config import differing_keys, flatten


def read(connection: sql.Connection, run: Run) -> dict[str, Any]:
    """Counts, seconds, the configuration a run was created with, what changed since, and versions."""
    values = {"run": run.name}
    [counts] = sql.query(connection, sql.own_text("inspect/report/summary"), values).to_pylist()
    changed = sql.query(connection, sql.own_text("inspect/report/config_changes"), values).to_pylist()
    created = open_run(run.name, run.root)
    return {
        "run": run.name,
        **counts,
        "config": {key: json.dumps(value) for key, value in flatten(created.get("config", {})).items()},
        "changes": [
            f"iteration {row['iteration']}: {text}"
            for row in changed
            for text in differing_keys(json.loads(row["before"]), json.loads(row["config"]))
        ],
        "versions": created.get("versions", {}),
    }
