"""show.prompt: one prompt at two moments or over a whole training: how its responses change."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.console import printable, sparkline, table, thinned
from grpo.errors import UsageError
from grpo.inspect.show.choice import Draw, Opened, check_sampled
from grpo.inspect.show.groups import beside, question_of, response_of, signed

_DRAWS_SHOWN = 20
_Colours = dict[float | None, str]  # reward -> colour; one that is not there has none
# [0-9]: int() refuses ², which is a digit, and thousands of digits.
_MOMENT = re.compile("(?P<own>[0-9]{1,9})|(?P<name>[^:]+)(:(?P<at>[0-9]{1,9}))?")


def draws_of(run: ActiveRun, prompt: int) -> list[Draw]:
    """Every group that drew a prompt, earliest first. Raises UsageError (exit 2) where there is none."""
    found = sql.read([run], sql.own_text("inspect/show/draws"), {"prompt_id": prompt})
    rows = found.to_pylist(maps_as_pydicts="strict")
    if not rows:
        manifest = run.manifest("prompts", None)
        known = manifest.rows if manifest else 0
        why = "was not drawn yet" if 0 <= prompt < known else f"the run has prompts 0 to {known - 1}"
        raise UsageError(f"--prompt {prompt}: {why}")
    return [list(draw) for _, draw in groupby(rows, key=lambda row: (row["iteration"], row["group_id"]))]


def moment(run: ActiveRun, iteration: int, against: str, opened: Opened) -> tuple[ActiveRun, int]:
    """What `--against` names: an iteration `40`, a run at the same one `NAME`, or both `NAME:40`.

    Raises UsageError (exit 2) for anything else, other prompts, and an iteration without rollouts.
    """
    found = _MOMENT.fullmatch(against)
    if not found:
        raise UsageError(f"--against {against}: expected an iteration 40, a run NAME, or NAME:40")
    other, at = opened(found["name"]) if found["name"] else run, int(found["own"] or found["at"] or iteration)
    if run.id_of("prompts") != other.id_of("prompts"):
        raise UsageError(f"--against {against}: {other.name} has other prompts than {run.name}")
    check_sampled(other, at, at, f"--against {other.name}:{at}")
    return other, at


def pairs_of(draws: list[Draw], others: list[Draw]) -> list[tuple[Draw, Draw]]:
    """The first groups of two moments that drew the same prompt, in the order of the first."""
    second = {draw[0]["prompt_id"]: draw for draw in reversed(others)}
    pairs: dict[int, tuple[Draw, Draw]] = {}
    for draw in draws:
        prompt = draw[0]["prompt_id"]
        if prompt in second:
            pairs.setdefault(prompt, (draw, second[prompt]))
    return list(pairs.values())


def print_pairs(console: Console, pairs: list[tuple[Draw, Draw]]) -> None:
    """Prompts at two moments: equal responses counted, side by side."""
    for pair in pairs:
        first, colours = pair[0][0], _colours(pair)
        console.rule(f"prompt {first['prompt_id']}", align="left", style="dim")
        console.print(question_of(first))
        named = len({draw[0]["run"] for draw in pair}) > 1
        console.print(beside([(_title(draw, named), _responses(draw, colours)) for draw in pair]))


def print_over_time(console: Console, draws: list[Draw]) -> None:
    """How the responses to one prompt changed: a line for each draw, then the first and the last in full."""
    first, last = draws[0][0], draws[-1][0]
    console.print(question_of(first))
    where = f"iterations {first['iteration']} to {last['iteration']}"
    drawn = f"prompt {first['prompt_id']}, drawn {len(draws)} times in {where}   reward "
    means = sparkline([draw[0]["group_mean"] for draw in draws])
    console.print(Text.assemble((drawn, "dim"), (means, "green")))
    colours, responses = _colours(draws), "responses, the most frequent first"
    cells = [
        [
            str(draw[0]["iteration"]),
            str(draw[0]["group_id"]),
            signed(draw[0]["group_mean"], ""),
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
        text = Text(signed(reward), colours.get(reward, ""))
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


def _colours(draws: Iterable[Draw]) -> _Colours:
    """Green for the highest reward of what is shown, red for the lowest, neither where all are the same."""
    rewards = {row["reward"] for draw in draws for row in draw} - {None}
    ends = {min(rewards): "red", max(rewards): "green"} if len(rewards) > 1 else {}
    return {None: "dim", **ends}
