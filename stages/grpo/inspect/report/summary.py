"""summary: what stands above the curves: how much a run did, how it was configured, what made it."""

import json
from typing import Any

from grpo import sql
from grpo.artifacts import Run, open_run
from grpo.config import differing_keys, flatten

_COUNTS = """
select
    count(distinct iteration) as iterations,
    count(*) as rollouts,
    count(distinct prompt_id) as prompts,
    sum(response_tokens)::bigint as tokens,
from rollouts
where run = $run
"""

_SECONDS = "select sum(seconds) as seconds from timings where run = $run and iteration is not null"

# Per stage the configuration of each iteration, where it is not that of the iteration before.
_CHANGES = """
select iteration, stage, config, before,
from (
    select iteration, stage, config,
        lag(config) over (partition by stage order by iteration) as before,
    from manifests
    where run = $run and iteration is not null
)
where config <> before
order by iteration, stage
"""


def read(connection: sql.Connection, run: Run) -> dict[str, Any]:
    """Counts, seconds, the configuration a run was created with, what changed since, and versions."""
    values = {"run": run.name}
    [counts] = sql.query(connection, _COUNTS, values).to_pylist()
    [seconds] = sql.query(connection, _SECONDS, values)["seconds"].to_pylist()
    created = open_run(run.name, run.root)
    changes = [
        f"iteration {row['iteration']}: {text}"
        for row in sql.query(connection, _CHANGES, values).to_pylist()
        for text in differing_keys(json.loads(row["before"]), json.loads(row["config"]))
    ]
    config = {key: json.dumps(value) for key, value in flatten(created.get("config", {})).items()}
    return {
        "run": run.name,
        **counts,
        "seconds": seconds,
        "config": config,
        "changes": changes,
        "versions": created.get("versions", {}),
    }
