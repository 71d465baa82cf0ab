"""show.groups: groups as a person reads them: a prompt, its K responses, rewards and advantages.

What a model wrote is shown as text, never as markup.
"""

from itertools import groupby
from typing import TYPE_CHECKING

from grpo.console import number, printable, table
from grpo.inspect.show.choice import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_MIN_COLUMN = 28  # characters of a response beside another one
_GAP = 3


def print_groups(console: "Console", rows: list[Row], rewards: list[str], side_by_side: bool) -> None:
    """Print rows of `samples` group by group; `rewards`: the names to show by part."""
    for _, members in groupby(rows, key=lambda row: row["group_id"]):
        samples = list(members)
        print_prompt(console, samples[0])
        (_print_columns if side_by_side else _print_table)(console, samples, rewards)
        console.print()


def print_prompt(console: "Console", first: Row) -> None:
    """The heading of a group: where it is, how it did, and what was asked."""
    from rich.text import Text

    mean, deviation = first["group_mean"], first["group_std"]
    reward = "" if mean is None else f"   reward {mean:.3f}"
    spread = "" if deviation is None else f" ± {deviation:.3f}"  # a group of one has none
    where = f"iteration {first['iteration']}  group {first['group_id']}  prompt {first['prompt_id']}"
    console.rule(Text(f"{where}{reward}{spread}"), align="left", style="dim")
    console.print(Text(printable(first["prompt"]).rstrip()), answer_of(first))


def answer_of(first: Row) -> "Text":
    """The last line of the reference answer, in words; empty where there is none."""
    from rich.text import Text

    lines = (first["answer"] or "").splitlines()
    return Text(printable(f"   answer: {lines[-1]}") if lines else "", style="dim")


def response_of(row: Row) -> "Text":
    """What the model wrote."""
    from rich.text import Text

    return Text(printable(row["response"])) if row["response"] else Text("(empty)", "dim")


def signed(value: float | None, absent: str | None = None) -> str:
    """A reward or an advantage with its sign; `absent` where there is none."""
    return number(value, "+.3f", absent or "")


def _print_table(console: "Console", samples: list[Row], rewards: list[str]) -> None:
    names = ("sample", *rewards, "reward", "advantage", "tokens", "end", "response")
    cells = [
        [
            str(row["sample_id"]),
            *(signed((row["rewards"] or {}).get(name), "-") for name in rewards),
            signed(row["reward"]),
            signed(row["advantage"], row["reason"]),
            str(row["response_tokens"]),
            row["finish_reason"],
            response_of(row),
        ]
        for row in samples
    ]
    console.print(table(names, cells, left=("response",), plain=True))


def _print_columns(console: "Console", samples: list[Row], rewards: list[str]) -> None:
    """Responses beside one another, as many as fit."""
    from rich import box
    from rich.table import Table

    fit = max(1, (console.width + _GAP) // (_MIN_COLUMN + _GAP))
    for begin in range(0, len(samples), fit):
        beside = samples[begin : begin + fit]
        found = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for row in beside:
            found.add_column(_caption(row, rewards), ratio=1, overflow="fold")
        for _ in range(fit - len(beside) if begin else 0):
            found.add_column(ratio=1)  # the last line keeps the columns of the others
        found.add_row(*(response_of(row) for row in beside))
        console.print(found)


def _caption(row: Row, rewards: list[str]) -> "Text":
    from rich.text import Text

    lines = [
        ("sample ", str(row["sample_id"]), f"   {row['response_tokens']} tokens, {row['finish_reason']}"),
        ("reward ", signed(row["reward"], "none"), ""),
        ("advantage ", signed(row["advantage"], row["reason"] or "none"), ""),
        *((f"{name} ", signed((row["rewards"] or {}).get(name), "-"), "") for name in rewards),
    ]
    text = Text()
    for index, (name, value, rest) in enumerate(lines):
        text.append("\n" if index else "").append(printable(name), "dim")
        text.append(printable(value), "not bold").append(rest, "dim")
    return text
