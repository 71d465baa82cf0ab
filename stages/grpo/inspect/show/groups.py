"""show.groups: groups as a person reads them: a prompt, its K responses, rewards and advantages.

What a model wrote is shown as text, never as markup.
"""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.console import number, printable, table
from grpo.inspect.show.choice import Draw, Row

_MIN_COLUMN = 28  # characters of a response beside another one
_GAP = 3


def print_tables(console: Console, draws: list[Draw], rewards: tuple[str, ...]) -> None:
    """Print groups, a line for each rollout; `rewards`: the names to show by part."""
    names = ("sample", *rewards, "reward", "advantage", "tokens", "end", "response")
    for draw in draws:
        print_prompt(console, draw[0])
        cells = [
            (
                *numbers_of(row, rewards, ""),
                str(row["response_tokens"]),
                row["finish_reason"],
                response_of(row),
            )
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
        if len(columns) > fit:
            columns += [(Text(), Text())] * (
                -len(columns) % fit
            )  # the last line has the columns of the others
        for begin in range(0, len(columns), fit):
            console.print(beside(columns[begin : begin + fit]))
        console.print()


def print_prompt(console: Console, first: Row) -> None:
    """The heading of a group: where it is, how it did, and what was asked."""
    mean, deviation = first["group_mean"], first["group_std"]
    reward = "" if mean is None else f"   reward {mean:.3f}"
    spread = "" if deviation is None else f" ± {deviation:.3f}"  # a group of one has none
    where = f"iteration {first['iteration']}  group {first['group_id']}  prompt {first['prompt_id']}"
    console.rule(f"{where}{reward}{spread}", align="left", style="dim")
    console.print(question_of(first))


def question_of(row: Row) -> Text:
    """What was asked, and behind it the last line of the reference answer, where there is one."""
    question = Text(printable(row["prompt"]).rstrip())
    for line in (row["answer"] or "").splitlines()[-1:]:
        question.append(printable(f"    answer: {line}"), "dim")
    return question


def response_of(row: Row) -> Text:
    """What the model wrote."""
    return Text(printable(row["response"])) if row["response"] else Text("(empty)", "dim")


def signed(value: float | None, absent: str = "none") -> str:
    """A reward or an advantage with its sign; `absent` where there is none."""
    return number(value, "+.3f", absent)


def numbers_of(row: Row, rewards: tuple[str, ...] = (), absent: str = "none") -> list[str]:
    """Of a rollout its sample_id, rewards by part, its reward and its advantage, or why it has none."""
    parts = [signed((row["rewards"] or {}).get(name), "-") for name in rewards]
    numbers = (signed(row["reward"], absent), signed(row["advantage"], row["reason"] or absent))
    return [str(row["sample_id"]), *parts, *numbers]


def beside(columns: list[tuple[Text, Any]]) -> Table:
    """Columns of one width, each of a heading and what is below it."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for heading, _ in columns:
        found.add_column(heading, ratio=1, overflow="fold")
    found.add_row(*(content for _, content in columns))
    return found


def _caption(row: Row, rewards: tuple[str, ...]) -> Text:
    names = ("sample", *rewards, "reward", "advantage")
    lines = [
        Text.assemble((f"{printable(name)} ", "dim"), (printable(value), "not bold"))
        for name, value in zip(names, numbers_of(row, rewards), strict=True)
    ]
    lines[0].append(f"   {row['response_tokens']} tokens, {row['finish_reason']}", "dim")
    return Text("\n").join(lines)
