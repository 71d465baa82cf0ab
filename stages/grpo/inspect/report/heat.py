"""heat: the pass rate of every prompt in every iteration that drew it, for the map of the page."""

from typing import Any

import numpy as np

from grpo import sql
from grpo.artifacts import Run

_CHARACTERS = 240  # of a prompt that is pointed at
_ALL_CHARACTERS = 2_000_000  # of all prompts: with very many of them, less of each is shown

# The first reward of the configuration is what a run is after; the others help or are compared.
_REWARD = """
select
    name,
    bool_and(value in (0, 1)) as binary,
from rewards
where run = $run and status = 'ok'
group by name
order by name <> $first, name
limit 1
"""

_CELLS = """
select
    prompt_id,
    iteration,
    avg(value order by group_id, sample_id) as mean,
    count(*)::integer as rollouts,
from rewards
join rollouts using (run, iteration, group_id, sample_id)
where run = $run and name = $name and status = 'ok'
group by prompt_id, iteration
order by prompt_id, iteration
"""

_PROMPTS = """
select prompt_id, min(prompt)[:$characters] as prompt,
from memory.main.rollouts
where run = $run
group by prompt_id
order by prompt_id
"""


def read(connection: sql.Connection, run: Run) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(document, columns): one cell for each prompt and iteration, its mean reward and its rollouts."""
    values = {"run": run.name, "first": run.config.score.rewards[0].name or ""}
    found = sql.query(connection, _REWARD, values).to_pylist()
    if not found:
        return {"prompts": [], "absent": "no reward was given in this run yet"}, {}
    cells = sql.query(connection, _CELLS, {"run": run.name, "name": found[0]["name"]})
    ids = np.unique(cells["prompt_id"].to_numpy())
    characters = min(_CHARACTERS, _ALL_CHARACTERS // max(len(ids), 1))
    prompts = sql.query(connection, _PROMPTS, {"run": run.name, "characters": characters})
    texts = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    document = {
        "reward": found[0]["name"],
        "binary": found[0]["binary"],
        "prompts": [texts[prompt_id] for prompt_id in ids.tolist()],
        "prompt_ids": ids.tolist(),
    }
    return document, {
        "prompt": np.searchsorted(ids, cells["prompt_id"].to_numpy()).astype(np.uint32),
        "iteration": cells["iteration"].to_numpy(),
        "mean": cells["mean"].to_numpy().astype(np.float32),
        "rollouts": cells["rollouts"].to_numpy(),
    }
