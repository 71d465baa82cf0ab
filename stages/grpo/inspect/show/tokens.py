"""show.tokens: a response token by token: how likely each was when sampled, and what the learner says."""

import math
from itertools import chain

from rich.console import Console
from rich.text import Text

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.console import printable
from grpo.errors import InputError
from grpo.inspect.show.choice import Draw, Row
from grpo.inspect.show.groups import numbers_of, print_prompt
from grpo.models.tokenizer import FILE, pieces, starting_policy, tokenizer_of

_LEAST_LIKELY = 5
# Least probability -> background: the less likely, the warmer.
SHADES = {
    0.9: "",
    0.5: "white on grey30",
    0.1: "black on dark_goldenrod",
    0.01: "black on dark_orange3",
    0.0: "white on red3",
}


def add_tokens(run: ActiveRun, iteration: int, draws: list[Draw]) -> None:
    """Give each row its `tokens`: of each its text, id, old_logprob, and policy_logprob or null.

    Raises InputError (exit 4) when no policy of the run has a tokenizer that says what a token is.
    """
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        path = (starting_policy(run) or run.path) / FILE
        raise InputError(f"{path}: missing, and no policy of run {run.name} has one; --tokens needs it")
    groups = {"groups": [draw[0]["group_id"] for draw in draws]}
    found = sql.read([run], sql.own_text("inspect/show/tokens"), groups, iteration).to_pylist()
    tokens_of = {(row["group_id"], row["sample_id"]): row["tokens"] for row in found}
    for row in chain.from_iterable(draws):
        tokens = tokens_of[row["group_id"], row["sample_id"]]
        texts = pieces(tokenizer, [token["token_id"] for token in tokens])
        row["tokens"] = [{"text": text, **token} for text, token in zip(texts, tokens, strict=True)]


def print_tokens(console: Console, draws: list[Draw]) -> None:
    """Print responses shaded by the probability of their tokens, and where sampler and learner differ."""
    legend = Text("probability when sampled: ", "dim")
    for least, style in SHADES.items():
        label = f"from {least:g}" if least else f"below {sorted(SHADES)[1]:g}"
        legend.append(f" {label} ", style).append(" ")
    console.print(legend)
    for draw in draws:
        print_prompt(console, draw[0])
        for row in draw:
            sample, reward, advantage = numbers_of(row)
            console.print(f"sample {sample}  reward {reward}  advantage {advantage}", style="dim")
            console.print(_shaded(row["tokens"]))
            for line in (*_least_likely(row["tokens"]), *_learner(row["tokens"])):
                console.print(f"  {line}", style="dim")
        console.print()


def _shaded(tokens: list[Row]) -> Text:
    text = Text()
    for token in tokens:
        probability = math.exp(token["old_logprob"])
        style = next(style for least, style in SHADES.items() if probability >= least)
        text.append(printable(token["text"]), style)
    return text


def _least_likely(tokens: list[Row]) -> list[str]:
    """The least likely tokens, in words: what shading says where there is no colour."""
    rare = sorted(enumerate(tokens), key=lambda item: item[1]["old_logprob"])[:_LEAST_LIKELY]
    told = [
        f"'{printable(token['text'])}' {probability:.3f} (token {place})"
        for place, token in rare
        if (probability := math.exp(token["old_logprob"])) < max(SHADES)
    ]
    return [f"least likely: {', '.join(told)}"] if told else []


def _learner(tokens: list[Row]) -> list[str]:
    """How far the learner's log-probs are from the sampler's; nothing where no update read the rollout."""
    apart = [abs(t["policy_logprob"] - t["old_logprob"]) for t in tokens if t["policy_logprob"] is not None]
    if not apart:
        return []
    largest = max(range(len(apart)), key=apart.__getitem__)
    if not apart[largest]:
        return ["learner and sampler: the same log-probs"]
    mean, text = sum(apart) / len(apart), printable(tokens[largest]["text"])
    return [
        f"learner against sampler: mean |difference| {mean:.1e} nats, largest {apart[largest]:.1e} at"
        f" '{text}' (token {largest})"
    ]
