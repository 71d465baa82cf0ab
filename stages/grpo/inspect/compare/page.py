"""compare.page: a comparison as a person reads it; what a model wrote as text, never as markup."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.artifacts import STAGE_OUTPUTS
from grpo.console import (
    interval,
    iterations_text,
    number,
    printable,
    sparkline,
    stdout_console,
    table,
    thinned,
)
from grpo.inspect.compare.measures import counted
from grpo.inspect.show.page import response_of

_REWARD_ROWS, _RUN_ROWS = 12, 10  # iterations in a table; a curve has more points than that
_REWARD_POINTS, _RUN_POINTS = 60, 30
_COUNTS = ("rollouts_spent", "tokens_spent")
_FORMS = {
    "iteration": "d",
    **dict.fromkeys(("flipped", "tied in one", "lose signal", "gain signal", "other sign"), ".1%"),
    **dict.fromkeys(_COUNTS, ",.0f"),
}
_ONLY_DRAWN = ("rewards.", "pass_rate", "eval_")  # how the curves begin that the table does not have
_SHORT = {"response_tokens": "length", "groups_without_signal": "no signal"}
_LEFT_OUT = {
    "without_value": "of which one of the runs has no value",
    "in_one_run": "of a prompt that only one of the runs drew there",
}
# What the differences are between: by whether numbers are of pairs, all, none or some of them.
_HOW = {
    (True,): "the same prompts in both: differences within a pair of groups",
    (False,): "other prompts in A than in B: differences between groups that are not pairs",
    (
        False,
        True,
    ): "within a pair of groups, but where A and B have a number of groups each: those are not pairs",
}
Row = dict[str, Any]


def print_comparison(data: Row) -> None:
    """Print the document of compare.describe."""
    of_runs = _print_many if "runs" in data else _print_runs
    (_print_rewards if data["compared"] == "rewards" else of_runs)(stdout_console(), data)


def _print_rewards(console: Console, data: Row) -> None:
    total, rows = data["overall"], data["iterations"]
    console.print(f"run {data['run']}: {data['a']} (A) against {data['b']} (B)", style="bold")
    over = iterations_text([row["iteration"] for row in rows])
    counted = f"{total['rollouts']:,} rollouts in {total['groups']:,} groups of {over}"
    left_out = {
        "have no value of one of them": data["rollouts"]["without_both"],
        "are alone in their group": data["rollouts"]["compared"] - total["rollouts"],
    }
    more = "; ".join(f"{count:,} more {what}" for what, count in left_out.items() if count)
    console.print(f"{counted}{f' ({more})' if more else ''}\n")
    console.print(_summary(total))
    if len(rows) > 1:
        _print_agreement(console, rows)
    if data["examples"]:
        console.print("\nwhere they disagree most", style="bold")
    for example in data["examples"]:
        where = f"iteration {example['iteration']}  group {example['group_id']}"
        flipped = f"{example['flipped']} of {example['pairs']} pairs flipped"
        console.print()
        console.rule(f"{where}   {flipped}", align="left", style="dim")
        console.print(printable(example["prompt"]).rstrip())
        cells = [
            (str(row["sample_id"]), number(row["a"], "+.3f"), number(row["b"], "+.3f"), response_of(row))
            for row in example["samples"]
        ]
        columns = ("sample", data["a"], data["b"], "response")
        console.print(table(columns, cells, left=("response",), plain=True))


def _summary(total: Row) -> Table:
    found = Table(box=None, pad_edge=False, show_header=False)
    for side in ("left", "right", "right"):
        found.add_column(justify=side)

    def heading(text: str, *cells: str) -> None:
        found.add_row(Text(text, "bold"), *(Text(cell, "dim") for cell in cells))

    def share(text: str, part: str, whole: str, style: str = "") -> None:
        found.add_row(Text(f"  {text}", style), f"{total[part]:,}", f"{total[part] / total[whole]:.1%}")

    heading("rank correlation, from -1 to 1", "overall", "in groups")
    for name, text in (("spearman", "Spearman"), ("kendall", "Kendall's tau-b")):
        found.add_row(f"  {text}", number(total[name]), number(total[f"{name}_in_groups"]))
    heading("pairs of rollouts within a group", f"{total['pairs']:,}")
    share("A and B order them alike", "agreeing", "pairs")
    share("flipped: one way by A, the other by B", "flipped", "pairs", "yellow")
    share("tied by A alone", "tied_in_a", "pairs")
    share("tied by B alone", "tied_in_b", "pairs")
    share("tied by both", "tied_in_both", "pairs")
    heading("groups with signal (rewards that differ)", f"{total['groups']:,}")
    share("by both", "signal_in_both", "groups")
    share("by A alone: lost with B in its place", "signal_lost", "groups", "yellow")
    share("by B alone: gained with B in its place", "signal_gained", "groups")
    share("by neither", "signal_in_none", "groups")
    heading("advantages, B's against A's", f"{total['rollouts']:,}")
    share("of the other sign", "sign_flips", "rollouts", "yellow")
    found.add_row("  mean |difference|", number(total["advantage_difference"]), "")
    return found


def _print_agreement(console: Console, rows: list[Row]) -> None:
    """How far two rewards agree, by iteration."""
    points = [_point(row) for row in rows]
    cells = [[_text(name, point[name]) for name in point] for point in thinned(points, _REWARD_ROWS)]
    console.print(table(points[0], cells))
    for name in ("in groups", "flipped", "|difference|"):
        console.print(f"  {name:<12}  {sparkline([each[name] for each in thinned(points, _REWARD_POINTS)])}")
    if len(rows) > _REWARD_ROWS:
        console.print(f"{_REWARD_ROWS} of {len(rows)} iterations shown; --json has all", style="dim")


def _point(row: Row) -> dict[str, float | None]:
    return {
        "iteration": row["iteration"],
        "Spearman": row["spearman"],
        "in groups": row["spearman_in_groups"],
        "flipped": row["flipped"] / row["pairs"],
        "tied in one": (row["tied_in_a"] + row["tied_in_b"]) / row["pairs"],
        "lose signal": row["signal_lost"] / row["groups"],
        "gain signal": row["signal_gained"] / row["groups"],
        "other sign": row["sign_flips"] / row["rollouts"],
        "|difference|": row["advantage_difference"],
    }


def _print_runs(console: Console, data: Row) -> None:
    console.print(f"runs: {data['a']} (A) against {data['b']} (B)", style="bold")
    console.print(_where_they_part(data))
    console.print("\nconfigured differently (A -> B)", style="bold")
    for text in data["configuration"] or ["nothing"]:
        console.print(f"  {printable(text)}", soft_wrap=True)
    if data["last"]:
        _print_last(console, data["last"], data["measured_otherwise"])
    else:
        same = "rollouts, rewards and advantages of these iterations are the same in both"
        console.print(f"\nno means: {same}")
    for text in _otherwise(data["measured_otherwise"]):
        console.print(printable(f"* {text}"), style="dim", soft_wrap=True)
    _print_overview(console, data["curves"])
    for text in counted(data["passing"]):
        console.print(printable(text), style="dim", soft_wrap=True)
    _print_iterations(console, data)


def _where_they_part(data: Row) -> str:
    firsts = {STAGE_OUTPUTS[output]: found["iteration"] for output, found in data["parted"].items() if found}
    if not firsts:
        return f"no difference in the {len(data['common_iterations'])} iterations that both have"
    begin = min(firsts.values())
    stages = ", ".join(f"{stage} {iteration}" for stage, iteration in firsts.items())
    same = "they share no iteration"
    if data["shared_iterations"]:
        same = f"{iterations_text(range(begin))} {'is' if begin == 1 else 'are'} the same in both"
    return f"{same}; the first that differ: {stages}"


def _print_many(console: Console, data: Row) -> None:
    """A column a run: the keys that differ at the head, then the numbers."""
    names, best = data["runs"], data["best"]
    console.print(f"runs: {', '.join(map(printable, names))}", style="bold", soft_wrap=True)
    names = _apart(names)
    console.print("\nconfigured differently", style="bold")
    keys = [[key, *map(_value, values)] for key, values in data["configuration"].items()]
    console.print(table(("", *names), keys, left=("",)) if keys else "  nothing")
    console.print(f"\nmeans of {iterations_text([data['first'], data['last']])}", style="bold")
    rows = [[row["name"], *(_text(row["name"], value) for value in row["values"])] for row in data["numbers"]]
    if any(best):
        measures = dict.fromkeys(each["measure"] for each in best if each)
        shown = (f"{each['value']:.3f} ({each['policy']})" if each else "" for each in best)
        rows.append([f"best {', '.join(measures)} (policy)", *shown])
    console.print(table(("", *names), rows, left=("",)))
    spent = (
        f"rollouts, tokens and seconds: up to iteration {data['last']}; eval_: of the policy measured last"
    )
    for text in (spent, *counted(data["passing"]), *_otherwise(data["measured_otherwise"])):
        console.print(printable(text), style="dim", soft_wrap=True)


def _apart(names: list[str]) -> list[str]:
    """Names without the words at their beginning and end that all share: those of a sweep are long."""
    words = [name.split("-") for name in names]
    shortest = min(map(len, words)) - 1  # a word at least stays
    same = [len({tuple(each[:n]) for each in words}) == 1 for n in range(1, shortest + 1)]
    first = same.index(False) if False in same else shortest
    same = [len({tuple(each[-n:]) for each in words}) == 1 for n in range(1, shortest - first + 1)]
    last = same.index(False) if False in same else shortest - first
    return ["-".join(each[first : len(each) - last]) for each in words]


def _value(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _otherwise(found: dict[str, str]) -> list[str]:
    """A line for what is not the same measure in all, for the numbers of which it is the same."""
    names: dict[str, list[str]] = {}
    for name, text in found.items():
        names.setdefault(text, []).append(name)
    return [f"not one measure: {', '.join(each)} ({text})" for text, each in names.items()]


def _print_last(console: Console, last: Row, otherwise: dict[str, str]) -> None:
    """Means of the last iterations with the interval of their difference; bold where 0 is outside.

    otherwise: numbers that are not the same measure in both; of those no difference is bold.
    """
    console.print(f"\nmeans of {iterations_text([last['first'], last['last']])}", style="bold")
    rows = []
    for row in last["numbers"]:
        is_one = row["name"] not in otherwise
        clear = is_one and row["low"] is not None and not row["low"] <= 0 <= row["high"]
        of = str(row["groups_a"]) if row["paired"] else f"{row['groups_a']}, {row['groups_b']}"
        ends = interval(row["low"], row["high"], "+.3f")
        cells = (
            row["name"] + " *" * (not is_one),
            number(row["a"]),
            number(row["b"]),
            number(row["difference"], "+.3f"),
            ends,
            of,
        )
        rows.append([Text(printable(cell), "bold" if clear else "") for cell in cells])
    console.print(table(("", "A", "B", "B - A", "95 % interval", "groups"), rows, left=("",)))
    how = _HOW[tuple(sorted({row["paired"] for row in last["numbers"]}))]
    for text in (f"bold: 0 is outside the interval; {how}", *_left_out(last["numbers"])):
        console.print(printable(text), style="dim", soft_wrap=True)


def _left_out(numbers: list[Row]) -> list[str]:
    """A line for what is left out, of the numbers of which it is the same."""
    found: dict[str, list[str]] = {}
    for row in numbers:
        reasons = [
            f"{count} {'group' if count == 1 else 'groups'} {_LEFT_OUT[reason]}"
            for reason, count in row["left_out"].items()
            if count
        ]
        if reasons:
            found.setdefault(" and ".join(reasons), []).append(row["name"])
    return [f"left out of {', '.join(names)}: {text}" for text, names in found.items()]


def _print_overview(console: Console, curves: list[Row]) -> None:
    """A line per curve and run, both drawn to the same scale."""
    rows = []
    for curve in curves:
        if curve["name"] in _COUNTS:
            continue
        points = thinned(curve["points"], _RUN_POINTS)
        of_a, of_b = ([point[run] for point in points] for run in ("a", "b"))
        known = [value for value in (*of_a, *of_b) if value is not None]
        low, high = min(known), max(known)
        lines = [sparkline(values, low, high) for values in (of_a, of_b)]
        rows.append([curve["name"], number(low), number(high), *lines])
    console.print(table(("curve", "from", "to", "A", "B"), rows, left=("curve", "A", "B")))


def _print_iterations(console: Console, data: Row) -> None:
    """Curves by iteration, a row of A above one of B; one row where all of both are the same."""
    curves = [curve for curve in data["curves"] if not curve["name"].startswith(_ONLY_DRAWN)]
    values = {
        (curve["name"], point["iteration"], run): _text(curve["name"], point[run])
        for curve in curves
        for point in curve["points"]
        for run in ("a", "b")
    }
    names = [curve["name"] for curve in curves]
    numbers = sorted({iteration for _, iteration, _ in values})
    rows: list[list[Any]] = []
    for iteration in thinned(numbers, _RUN_ROWS):
        of_a, of_b = ([values.get((name, iteration, run), "") for name in names] for run in ("a", "b"))
        if of_a == of_b:
            rows.append([str(iteration), Text("both", "dim"), *of_a])
        else:
            rows += [[str(iteration), data["a"], *of_a], ["", data["b"], *of_b]]
    columns = ("iteration", "run", *(_SHORT.get(name, name.removesuffix("_spent")) for name in names))
    console.print(table(columns, rows, left=("run",)))
    if len(numbers) > _RUN_ROWS:
        shown = f"{_RUN_ROWS} of {len(numbers)} iterations shown"
        console.print(f"{shown}, rewards by name left out; --json has all", style="dim")


def _text(name: str, value: float | None) -> str:
    return number(value, _FORMS.get(name, ".3f"))
