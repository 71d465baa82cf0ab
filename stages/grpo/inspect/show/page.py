"""show.page: rollouts as a person reads them; what a model wrote is shown as text, never as markup."""

import math
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.console import number, printable, sparkline, table, thinned
from grpo.inspect.show.choice import Draw, Row

_MIN_COLUMN = 28  # characters of a response beside another one
_GAP = 3
_DRAWS_SHOWN = 20
_LEAST_LIKELY = 5
# Least probability -> background: the less likely, the warmer.
SHADES = {
    0.9: "",
    0.5: "white on grey30",
    0.1: "black on dark_goldenrod",
    0.01: "black on dark_orange3",
    0.0: "white on red3",
}
_Colours = dict[float | None, str]  # reward -> colour; one that is not there has none


def print_tables(console: Console, draws: list[Draw], rewards: tuple[str, ...]) -> None:
    """Print groups, a line for each rollout; `rewards`: the names to show by part."""
    names = ("sample", *rewards, "reward", "advantage", "tokens", "end", "response")
    for draw in draws:
        print_prompt(console, draw[0])
        cells = [
            (*_cells(row, rewards, ""), str(row["response_tokens"]), row["finish_reason"], response_of(row))
            for row in draw
        ]
        console.print(table(names, cells, left=("response",), plain=True))
        console.print()


def print_columns(console: Console, draws: list[Draw], rewards: tuple[str, ...]) -> None:
    """The same, responses beside one another, as many as fit."""
    fit = max(1, (console.width + _GAP) // (_MIN_COLUMN + _GAP))
    for draw in draws:
        print_prompt(console, draw[0])
        columns = [(_caption(row, rewards), response_of(row)) for row in draw]
        if len(columns) > fit:  # the last line has the columns of the others
            columns += [(Text(), Text())] * (-len(columns) % fit)
        for begin in range(0, len(columns), fit):
            console.print(_beside(columns[begin : begin + fit]))
        console.print()


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
            sample, reward, advantage = _cells(row)
            console.print(f"sample {sample}  reward {reward}  advantage {advantage}", style="dim")
            console.print(_shaded(row["tokens"]))
            for line in (*_least_likely(row["tokens"]), *_learner(row["tokens"])):
                console.print(f"  {line}", style="dim")
        console.print()


def print_pairs(console: Console, pairs: list[tuple[Draw, Draw]]) -> None:
    """Prompts at two moments: equal responses counted, side by side."""
    for pair in pairs:
        first, colours = pair[0][0], _colours(*pair)
        console.rule(f"prompt {first['prompt_id']}", align="left", style="dim")
        console.print(_question_of(first))
        named = len({draw[0]["run"] for draw in pair}) > 1
        console.print(_beside([(_title(draw, named), _responses(draw, colours)) for draw in pair]))


def print_over_time(console: Console, draws: list[Draw]) -> None:
    """How the responses to one prompt changed: a line for each draw, then the first and the last in full."""
    first, last = draws[0][0], draws[-1][0]
    console.print(_question_of(first))
    where = f"iterations {first['iteration']} to {last['iteration']}"
    drawn = f"prompt {first['prompt_id']}, drawn {len(draws)} times in {where}   reward "
    means = sparkline([draw[0]["group_mean"] for draw in draws])
    console.print(Text.assemble((drawn, "dim"), (means, "green")))
    colours, responses = _colours(*draws), "responses, the most frequent first"
    cells = [
        [
            str(draw[0]["iteration"]),
            str(draw[0]["group_id"]),
            number(draw[0]["group_mean"], "+.3f"),
            _mean_tokens(draw),
            str(len({row["response"] for row in draw})),
            _counted(draw, colours),
        ]
        for draw in thinned(draws, _DRAWS_SHOWN)
    ]
    columns = ("iteration", "group", "reward", "tokens", "different", responses)
    console.print(table(columns, cells, left=(responses,)))
    if len(draws) > _DRAWS_SHOWN:
        console.print(f"{_DRAWS_SHOWN} of {len(draws)} draws shown; --json has all", style="dim")
    if len(draws) > 1:
        print_pairs(console, [(draws[0], draws[-1])])


def print_prompt(console: Console, first: Row) -> None:
    """The heading of a group: where it is, how it did, and what was asked."""
    mean, deviation = first["group_mean"], first["group_std"]
    reward = "" if mean is None else f"   reward {mean:.3f}"
    spread = "" if deviation is None else f" ± {deviation:.3f}"  # a group of one has none
    where = f"iteration {first['iteration']}  group {first['group_id']}  prompt {first['prompt_id']}"
    console.rule(f"{where}{reward}{spread}", align="left", style="dim")
    console.print(_question_of(first))


def _question_of(row: Row) -> Text:
    """What was asked, and behind it the last line of the reference answer, where there is one."""
    question = Text(printable(row["prompt"]).rstrip())
    for line in (row["answer"] or "").splitlines()[-1:]:
        question.append(printable(f"    answer: {line}"), "dim")
    return question


def response_of(row: Row) -> Text:
    """What the model wrote."""
    return Text(printable(row["response"])) if row["response"] else Text("(empty)", "dim")


def _cells(row: Row, rewards: tuple[str, ...] = (), absent: str = "none") -> list[str]:
    """Of a rollout its sample_id, rewards by part, its reward and its advantage, or why it has none."""
    parts = [number((row["rewards"] or {}).get(name), "+.3f", "-") for name in rewards]
    advantage = number(row["advantage"], "+.3f", row["reason"] or absent)
    return [str(row["sample_id"]), *parts, number(row["reward"], "+.3f", absent), advantage]


def _beside(columns: list[tuple[Text, Any]]) -> Table:
    """Columns of one width, each of a heading and what is below it."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for heading, _ in columns:
        found.add_column(heading, ratio=1, overflow="fold")
    found.add_row(*(content for _, content in columns))
    return found


def _caption(row: Row, rewards: tuple[str, ...]) -> Text:
    names = ("sample", "reward", "advantage", *rewards)
    sample, *parts, reward, advantage = _cells(row, rewards)
    lines = [
        Text.assemble((f"{printable(name)} ", "dim"), (printable(value), "not bold"))
        for name, value in zip(names, (sample, reward, advantage, *parts), strict=True)
    ]
    lines[0].append(f"   {row['response_tokens']} tokens, {row['finish_reason']}", "dim")
    return Text("\n").join(lines)


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


def _title(draw: Draw, named: bool) -> Text:
    run, iteration, mean = (draw[0][name] for name in ("run", "iteration", "group_mean"))
    reward = "" if mean is None else f"reward {mean:.3f}  "
    where = f"{run} iteration {iteration}" if named else f"iteration {iteration}"
    return Text.assemble((where, "bold"), (f"\n{reward}{_mean_tokens(draw)} tokens", "dim"))


def _mean_tokens(draw: Draw) -> str:
    return f"{sum(row['response_tokens'] for row in draw) / len(draw):.1f}"


def _responses(draw: Draw, colours: _Colours) -> Table:
    """Equal responses of one reward as one row with their number, the most frequent first."""
    found = Table(box=None, show_header=False, pad_edge=False)
    found.add_column(justify="right", style="dim")
    found.add_column(justify="right")
    found.add_column(overflow="fold")
    for (response, reward), count in _frequent(draw):
        text = Text(number(reward, "+.3f", "none"), colours.get(reward, ""))
        found.add_row(f"{count} x", text, response_of({"response": response}))
    return found


def _counted(draw: Draw, colours: _Colours) -> Text:
    """Responses on one line, cut off where it ends: `6 x 9   2 x 72`."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for (response, reward), count in _frequent(draw):
        text.append(f"{'   ' if text else ''}{count} x ", "dim")
        text.append(" ".join(printable(response).split()) or "(empty)", colours.get(reward, ""))
    return text


def _frequent(draw: Draw) -> list[tuple[tuple[str, float | None], int]]:
    counted = Counter((row["response"], row["reward"]) for row in draw)
    return sorted(counted.items(), key=lambda item: (-item[1], -(item[0][1] or 0), item[0][0]))


def _colours(*draws: Draw) -> _Colours:
    """Green for the highest reward of what is shown, red for the lowest, neither where all are the same."""
    rewards = {row["reward"] for draw in draws for row in draw} - {None}
    ends = {min(rewards): "red", max(rewards): "green"} if len(rewards) > 1 else {}
    return {None: "dim", **ends}
