"""compare.run_page: what two runs have in common and where they part, as a person reads it."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from rich.console import Console

_ROWS_SHOWN = 10
_SPARKLINE_POINTS = 30
_IN_TABLE = (
    *("reward", "kl", "entropy", "response_tokens", "truncated"),
    *("groups_without_signal", "rollouts_spent", "tokens_spent", "seconds"),
)
_SHORT = {
    "response_tokens": "length",
    "groups_without_signal": "no signal",
    "rollouts_spent": "rollouts",
    "tokens_spent": "tokens",
}
_COUNTS = ("rollouts_spent", "tokens_spent")
_NO_MEANS = "no means: rollouts, rewards and advantages of these iterations are the same in both"
_LEFT_OUT = {
    "without_value": "of which one of the runs has no value",
    "in_one_run": "of a prompt that only one of the runs drew there",
}


def print_runs(data: dict[str, Any]) -> None:
    """Print the document of compare.runs.describe."""
    from rich.text import Text

    console = stdout_console()
    console.print(Text(f"runs: {data['a']} (A) against {data['b']} (B)", "bold"))
    console.print(Text(_where_they_part(data)))
    console.print(Text("\nconfigured differently (A -> B)", "bold"))
    for text in data["configuration"] or ["nothing"]:
        console.print(Text(f"  {printable(text)}"), soft_wrap=True)
    _print_last(console, data)
    _print_overview(console, data)
    _print_iterations(console, data)


def _where_they_part(data: dict[str, Any]) -> str:
    common, shared = data["common_iterations"], data["shared_iterations"]
    if not any(data["parted"].values()):
        return f"no difference in the {len(common)} iterations that both have"
    firsts = {STAGE_OUTPUTS[output]: found["iteration"] for output, found in data["parted"].items() if found}
    begin = min(firsts.values())
    stages = ", ".join(f"{stage} {iteration}" for stage, iteration in firsts.items())
    are = "is" if begin == 1 else "are"
    same = f"{iterations_text(range(begin))} {are} the same in both" if shared else "they share no iteration"
    return f"{same}; the first that differ: {stages}"


def _print_last(console: "Console", data: dict[str, Any]) -> None:
    """Means of the last iterations with the interval of their difference; bold where 0 is outside."""
    from rich.text import Text

    last = data["last"]
    if last is None:
        console.print(Text(f"\n{_NO_MEANS}"))
        return
    console.print(Text(f"\nmeans of {iterations_text([last['first'], last['last']])}", "bold"))
    rows = []
    for row in last["numbers"]:
        clear = row["low"] is not None and not row["low"] <= 0 <= row["high"]
        of = str(row["groups_a"]) if row["paired"] else f"{row['groups_a']}, {row['groups_b']}"
        ends = interval(row["low"], row["high"], "+.3f")
        cells = (row["name"], number(row["a"]), number(row["b"]), number(row["difference"], "+.3f"), ends, of)
        rows.append([Text(printable(cell), "bold" if clear else "") for cell in cells])
    console.print(table(("", "A", "B", "B - A", "95 % interval", "groups"), rows, left=("",)))
    for text in (f"bold: 0 is outside the interval; {_how(last['numbers'])}", *_left_out(last["numbers"])):
        console.print(Text(printable(text), "dim"), soft_wrap=True)


def _how(numbers: list[dict[str, Any]]) -> str:
    """What the differences are between; a number with two counts of groups is none of pairs."""
    paired = {row["paired"] for row in numbers}
    if paired == {True}:
        return "the same prompts in both: differences within a pair of groups"
    if paired == {False}:
        return "other prompts in A than in B: differences between groups that are not pairs"
    return "within a pair of groups, but where A and B have a number of groups each: those are not pairs"


def _left_out(numbers: list[dict[str, Any]]) -> list[str]:
    """A line for what is left out, of the numbers of which it is the same."""
    found: dict[str, list[str]] = {}
    for row in numbers:
        reasons = [
            f"{count} {'group' if count == 1 else 'groups'} {why}"
            for reason, why in _LEFT_OUT.items()
            if (count := row["left_out"].get(reason))
        ]
        if reasons:
            found.setdefault(" and ".join(reasons), []).append(row["name"])
    return [f"left out of {', '.join(names)}: {text}" for text, names in found.items()]


def _print_overview(console: "Console", data: dict[str, Any]) -> None:
    """A line per curve and run, both drawn to the same scale."""
    rows = []
    for curve in data["curves"]:
        if curve["name"] in _COUNTS:
            continue
        points = thinned(curve["points"], _SPARKLINE_POINTS)
        known = [point[run] for point in points for run in ("a", "b") if point[run] is not None]
        low, high = min(known), max(known)
        lines = [sparkline([point[run] for point in points], low, high) for run in ("a", "b")]
        rows.append([curve["name"], *(_value(curve["name"], value) for value in (low, high)), *lines])
    console.print(table(("curve", "from", "to", "A", "B"), rows, left=("curve", "A", "B")))


def _print_iterations(console: "Console", data: dict[str, Any]) -> None:
    """Every curve by iteration, a row of A above one of B; one row where all of both are the same."""
    from rich.text import Text

    curves = {
        curve["name"]: {point["iteration"]: point for point in curve["points"]}
        for curve in data["curves"]
        if curve["name"] in _IN_TABLE
    }
    numbers = sorted({number for points in curves.values() for number in points})
    rows: list[list[Any]] = []
    for iteration in thinned(numbers, _ROWS_SHOWN):
        of_a, of_b = (
            [_value(name, points.get(iteration, {}).get(run)) for name, points in curves.items()]
            for run in ("a", "b")
        )
        if of_a == of_b:
            rows.append([str(iteration), Text("both", "dim"), *of_a])
        else:
            rows += [[str(iteration), data["a"], *of_a], ["", data["b"], *of_b]]
    headings = (_SHORT.get(name, name) for name in curves)
    console.print(table(("iteration", "run", *headings), rows, left=("run",)))
    if len(numbers) > _ROWS_SHOWN:
        console.print(
            f"{_ROWS_SHOWN} of {len(numbers)} iterations shown, rewards by name left out; --json has all",
            style="dim",
            highlight=False,
        )


def _value(name: str, value: float | None) -> str:
    return number(value, ",.0f" if name in _COUNTS else ".3f")
