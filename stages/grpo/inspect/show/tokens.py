"""show.tokens: a response token by token: how likely each was when sampled, and what the learner says."""

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.console import printable
from grpo.errors import InputError
from grpo.inspect.show.choice import Row
from grpo.inspect.show.groups import print_prompt, signed
from grpo.models.tokenizer import FILE, pieces, starting_policy, tokenizer_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_LEAST_LIKELY = 5
# Least probability -> background: the less likely, the warmer.
SHADES = (
    (0.9, ""),
    (0.5, "white on grey30"),
    (0.1, "black on dark_goldenrod"),
    (0.01, "black on dark_orange3"),
    (0.0, "white on red3"),
)


def add_tokens(run: ActiveRun, iteration: int, rows: list[Row]) -> list[Row]:
    """The rows with `tokens`: of each its text, id, old_logprob, and policy_logprob or null.

    Raises InputError (exit 4) when no policy of the run has a tokenizer that says what a token is.
    """
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        path = (starting_policy(run) or run.path) / FILE
        raise InputError(f"{path}: missing, and no policy of run {run.name} has one; --tokens needs it")
    groups = {"groups": sorted({row["group_id"] for row in rows})}
    sampled = _by_key(sql.read([run], sql.own_text("inspect/show/tokens"), groups, iteration).to_pylist())
    learned = _by_key(sql.read([run], sql.own_text("inspect/show/learner"), groups, iteration).to_pylist())
    found = []
    for row in rows:
        key = row["group_id"], row["sample_id"]
        ids, old = sampled[key]["response_token_ids"], sampled[key]["old_logprobs"]
        policy = learned[key]["policy_logprobs"] if key in learned else [None] * len(ids)
        fields = zip(pieces(tokenizer, ids), ids, old, policy, strict=True)
        names = ("text", "token_id", "old_logprob", "policy_logprob")
        found.append({**row, "tokens": [dict(zip(names, values, strict=True)) for values in fields]})
    return found


def print_tokens(console: "Console", rows: list[Row]) -> None:
    """Print responses shaded by the probability of their tokens, and where sampler and learner differ."""
    from rich.text import Text

    console.print(_legend())
    for _, members in groupby(rows, key=lambda row: row["group_id"]):
        samples = list(members)
        print_prompt(console, samples[0])
        for row in samples:
            numbers = (signed(row["reward"], "none"), signed(row["advantage"], row["reason"] or "none"))
            console.print(
                Text(f"sample {row['sample_id']}  reward {numbers[0]}  advantage {numbers[1]}", "dim"),
                highlight=False,
            )
            console.print(_shaded(row["tokens"]))
            for line in (_least_likely(row["tokens"]), _learner(row["tokens"])):
                if line:
                    console.print(Text(f"  {line}", "dim"))
        console.print()


def _legend() -> "Text":
    from rich.text import Text

    text = Text("probability when sampled: ", "dim")
    above = ""
    for least, style in SHADES:
        text.append(f" {f'from {least:g}' if least else f'below {above}'} ", style).append(" ")
        above = f"{least:g}"
    return text


def _shaded(tokens: list[dict[str, Any]]) -> "Text":
    from rich.text import Text

    text = Text()
    for token in tokens:
        probability = math.exp(token["old_logprob"])
        text.append(printable(token["text"]), next(style for least, style in SHADES if probability >= least))
    return text


def _least_likely(tokens: list[dict[str, Any]]) -> str:
    """The least likely tokens, in words: what shading says where there is no colour."""
    rare = sorted(enumerate(tokens), key=lambda item: item[1]["old_logprob"])[:_LEAST_LIKELY]
    told = [
        f"'{printable(token['text'])}' {math.exp(token['old_logprob']):.3f} (token {place})"
        for place, token in rare
        if math.exp(token["old_logprob"]) < SHADES[0][0]
    ]
    return f"least likely: {', '.join(told)}" if told else ""


def _learner(tokens: list[dict[str, Any]]) -> str:
    """How far the learner's log-probs are from the sampler's; empty where no update read the rollout."""
    apart = [abs(t["policy_logprob"] - t["old_logprob"]) for t in tokens if t["policy_logprob"] is not None]
    if not apart:
        return ""
    largest = max(range(len(apart)), key=apart.__getitem__)
    if not apart[largest]:
        return "learner and sampler: the same log-probs"
    text = printable(tokens[largest]["text"])
    return (
        f"learner against sampler: mean |difference| {sum(apart) / len(apart):.1e} nats, largest"
        f" {apart[largest]:.1e} at '{text}' (token {largest})"
    )


def _by_key(rows: list[Row]) -> dict[tuple[int, int], Row]:
    return {(row["group_id"], row["sample_id"]): row for row in rows}
