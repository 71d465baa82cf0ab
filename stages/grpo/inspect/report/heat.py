"""heat: the pass rate of every prompt in every iteration that drew it, for the map of the page."""

from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun


def read(connection: sql.Connection, run: ActiveRun) -> dict[str, Any]:
    """One cell for each prompt (its place in `prompts`) and iteration: its mean reward and its rollouts."""
    values = {"run": run.name, "first": run.config.score.rewards[0].name or ""}
    cells = sql.query(connection, sql.own_text("inspect/report/heat_cells"), values).to_pydict()
    if not cells["mean"]:
        return {"prompts": [], "absent": "no reward was given in this run yet"}
    prompts = sql.query(connection, sql.own_text("inspect/report/heat_prompts"), {"run": run.name})
    texts = dict(zip(*prompts.to_pydict().values(), strict=True))
    places = {prompt_id: place for place, prompt_id in enumerate(sorted(set(cells["prompt_id"])))}
    columns = {name: cells[name] for name in ("iteration", "mean", "rollouts")}
    return {
        "reward": cells["name"][0],
        "binary": cells["is_binary"][0],
        "prompts": [texts[prompt_id] for prompt_id in places],
        "prompt_ids": list(places),
        "columns": {"prompt": [places[prompt_id] for prompt_id in cells["prompt_id"]], **columns},
    }
