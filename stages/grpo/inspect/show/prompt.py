"""show.prompt: one prompt at two moments or over a whole training: how its responses change."""

import re
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.console import printable, sparkline, table, thinned
from grpo.errors import UsageError
from grpo.inspect.show.choice import Row
from grpo.inspect.show.groups import answer_of, response_of, signed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Draw = list[Row]  # the rollouts of one group
Span = tuple[float, float]  # the lowest and the highest reward of what is shown
_DRAWS_SHOWN = 20
_NUMBER = re.compile("[0-9]{1,9}")  # int() refuses ², which is a digit, and thousands of digits


def draws_of(run: ActiveRun, prompt: int) -> list[Draw]:
    """Every group that drew a prompt, earliest first. Raises UsageError (exit 2) where there is none."""
    found = sql.read([run], sql.own_text("inspect/show/draws"), {"prompt_id": prompt}).to_pylist(
        maps_as_pydicts="strict"
    )
    draws = [list(rows) for _, rows in groupby(found, key=lambda row: (row["iteration"], row["group_id"]))]
    if not draws:
        manifest = run.manifest("prompts", None)
        rows = manifest.rows if manifest else 0
        why = "was not drawn yet" if 0 <= prompt < rows else f"the run has prompts 0 to {rows - 1}"
        raise UsageError(f"--prompt {prompt}: {why}")
    return draws


def moment(run: ActiveRun, iteration: int, against: str, opened: Any) -> tuple[ActiveRun, int]:
    """What `--against` names: an iteration `40`, a run at the same one `NAME`, or both `NAME:40`."""
    name, _, at = against.partition(":")
    if _NUMBER.fullmatch(against):
        name, at = "", against
    if not (_NUMBER.fullmatch(at) or (name and not at and ":" not in against)):
        raise UsageError(f"--against {against}: expected an iteration 40, a run NAME, or NAME:40")
    other = opened(name) if name else run
    if other.name != run.name:
        held = [found.ids if found else {} for found in (o.manifest("prompts", None) for o in (run, other))]
        if held[0] != held[1]:
            raise UsageError(f"--against {against}: {other.name} has other prompts than {run.name}")
    return other, int(at) if at else iteration


def pairs_of(rows: list[Row], others: list[Row]) -> list[tuple[Draw, Draw]]:
    """The groups of two moments that drew the same prompt, in the order of the first."""
    first, second = (_first_draws(found) for found in (rows, others))
    return [(draw, second[prompt]) for prompt, draw in first.items() if prompt in second]


def _first_draws(rows: list[Row]) -> dict[int, Draw]:
    found: dict[int, Draw] = {}
    for _, members in groupby(rows, key=lambda row: row["group_id"]):
        draw = list(members)
        found.setdefault(draw[0]["prompt_id"], draw)
    return found


def print_pair(console: "Console", left: Draw, right: Draw) -> None:
    """One prompt at two moments: equal responses counted, side by side."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.rule(Text(f"prompt {left[0]['prompt_id']}"), align="left", style="dim")
    console.print(Text(printable(left[0]["prompt"]).rstrip()), answer_of(left[0]))
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for draw, other in ((left, right), (right, left)):
        found.add_column(_title(draw, other), ratio=1)
    found.add_row(*(_responses(draw, _span([left, right])) for draw in (left, right)))
    console.print(found)


def print_over_time(console: "Console", draws: list[Draw]) -> None:
    """How the responses to one prompt changed: a line for each draw, then the first and the last in full."""
    from rich.text import Text

    first, last = draws[0][0], draws[-1][0]
    means = [draw[0]["group_mean"] for draw in draws]
    console.print(Text(printable(first["prompt"]).rstrip()), answer_of(first))
    console.print(
        Text.assemble(
            (f"prompt {first['prompt_id']}, drawn {len(draws)} times in iterations", "dim"),
            (f" {first['iteration']} to {last['iteration']}   reward ", "dim"),
            (sparkline(means), "green"),
        )
    )
    span = _span(draws)
    responses = "responses, the most frequent first"
    cells = [
        [
            str(draw[0]["iteration"]),
            str(draw[0]["group_id"]),
            signed(draw[0]["group_mean"]),
            f"{sum(row['response_tokens'] for row in draw) / len(draw):.1f}",
            str(len({row["response"] for row in draw})),
            _counted(draw, span),
        ]
        for draw in thinned(draws, _DRAWS_SHOWN)
    ]
    console.print(
        table(("iteration", "group", "reward", "tokens", "different", responses), cells, (responses,))
    )
    if len(draws) > _DRAWS_SHOWN:
        console.print(f"{_DRAWS_SHOWN} of {len(draws)} draws shown; --json has all", style="dim")
    if len(draws) > 1:
        print_pair(console, draws[0], draws[-1])


def _title(draw: Draw, other: Draw) -> "Text":
    from rich.text import Text

    first = draw[0]
    run = f"{first['run']} " if first["run"] != other[0]["run"] else ""
    mean = "" if first["group_mean"] is None else f"reward {first['group_mean']:.3f}  "
    tokens = sum(row["response_tokens"] for row in draw) / len(draw)
    return Text.assemble(
        (f"{run}iteration {first['iteration']}", "bold"), (f"\n{mean}{tokens:.1f} tokens", "dim")
    )


def _responses(draw: Draw, span: Span) -> "Table":
    """Equal responses of one reward as one row with their number, the most frequent first."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, show_header=False, pad_edge=False)
    found.add_column(justify="right", style="dim")
    found.add_column(justify="right")
    found.add_column(overflow="fold")
    for (response, reward), count in _frequent(draw):
        reward_text = Text(signed(reward, "none"), _colour(reward, span))
        found.add_row(f"{count} x", reward_text, response_of({"response": response}))
    return found


def _counted(draw: Draw, span: Span) -> "Text":
    """Responses on one line, cut off where it ends: `6 x 9   2 x 72`."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    for (response, reward), count in _frequent(draw):
        text.append(f"{'   ' if text else ''}{count} x ", "dim")
        text.append(" ".join(printable(response).split()) or "(empty)", _colour(reward, span))
    return text


def _frequent(draw: Draw) -> list[tuple[tuple[str, float | None], int]]:
    counted = Counter((row["response"], row["reward"]) for row in draw)
    return sorted(counted.items(), key=lambda item: (-item[1], -(item[0][1] or 0), item[0][0]))


def _span(draws: list[Draw]) -> Span:
    rewards = [row["reward"] for draw in draws for row in draw if row["reward"] is not None]
    return min(rewards, default=0.0), max(rewards, default=0.0)


def _colour(reward: float | None, span: Span) -> str:
    """Green for the highest reward of what is shown, red for the lowest, neither where all are the same."""
    if span[0] == span[1]:
        return ""
    return {span[1]: "green", span[0]: "red"}.get(reward, "") if reward is not None else "dim"
