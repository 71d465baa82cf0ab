"""rollouts: the rollouts of a run for the page: what each was and got, and its tokens with their numbers."""

from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.inspect.report.selection import Limits, Selection, choose
from grpo.models.tokenizer import many_pieces, tokenizer_of

_BY_TOKEN = ("tokens", "logprobs", "log_ratios")


def read(connection: sql.Connection, run: ActiveRun, limit: Limits) -> tuple[dict[str, Any], Selection]:
    """The chosen rollouts of a run, and what was chosen.

    The lists of tokens and of their numbers (units: rollouts.sql) are beside the rollouts, one after the
    other, since like compresses best beside like. A token is a place in `texts`.
    """

    def query(name: str, **values: Any) -> list[dict[str, Any]]:
        text = sql.own_text(f"inspect/report/{name}")
        rows: list[dict[str, Any]] = sql.query(connection, text, {"run": run.name, **values}).to_pylist()
        return rows

    chosen = choose(query("rollout_sizes"), limit)
    groups = 2**31 - 1 if chosen.groups is None else chosen.groups
    found = query("rollouts", iterations=chosen.iterations, groups=groups)
    prompts = query("rollout_prompts", iterations=chosen.iterations, groups=groups)
    document: dict[str, Any] = {
        "prompts": {row.pop("prompt_id"): row for row in prompts},
        "rollouts": found,
        "tokens_absent": "",
        **{name: [row.pop(name) for row in found] for name in _BY_TOKEN},
    }
    if (tokenizer := tokenizer_of(run)) is None:
        problem = "no tokenizer.json is where the checkpoints of this run were"
        return {**document, "tokens_absent": problem, **dict.fromkeys(_BY_TOKEN)}, chosen
    for row in found:
        del row["response"]  # its tokens have the text
    texts, places, special = many_pieces(tokenizer, document["tokens"])
    return {**document, "tokens": places, "texts": texts, "special": special}, chosen
