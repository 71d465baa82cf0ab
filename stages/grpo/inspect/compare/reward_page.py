"""compare.reward_page: what two rewards have in common, as a person reads it."""

from typing import TYPE_CHECKING, Any

from grpo.console import iterations_text, number, printable, sparkline, stdout_console, table, thinned
from grpo.inspect.show.groups import response_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ROWS_SHOWN = 12
_SPARKLINE_POINTS = 60
_SHARES = ("flipped", "tied in one", "lose signal", "gain signal", "other sign")


def print_rewards(data: dict[str, Any]) -> None:
    """Print the document of compare.rewards.describe; what a model wrote as text, never as markup."""
    from rich.text import Text

    console, total = stdout_console(), data["overall"]
    over = iterations_text([row["iteration"] for row in data["iterations"]])
    console.print(
        Text.assemble(
            (f"run {data['run']}: {data['a']} (A) against {data['b']} (B)", "bold"),
            f"\n{total['rollouts']:,} rollouts in {total['groups']:,} groups of {over}",
            _left_out(data, total),
        ),
    )
    console.print()
    console.print(_summary(total))
    if len(data["iterations"]) > 1:
        _print_curve(console, data["iterations"])
    if data["examples"]:
        console.print(Text("\nwhere they disagree most", "bold"))
    for example in data["examples"]:
        _print_example(console, data, example)


def _left_out(data: dict[str, Any], total: dict[str, Any]) -> str:
    alone = data["rollouts"]["compared"] - total["rollouts"]
    texts = [
        f"{count:,} more {what}"
        for count, what in (
            (data["rollouts"]["without_both"], "have no value of one of them"),
            (alone, "are alone in their group"),
        )
        if count
    ]
    return f" ({'; '.join(texts)})" if texts else ""


def _summary(total: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, show_header=False)
    for side in ("left", "right", "right"):
        found.add_column(justify=side)

    def heading(text: str, *cells: str) -> None:
        found.add_row(Text(text, "bold"), *(Text(cell, "dim") for cell in cells))

    def share(text: str, count: int, of: int, style: str = "") -> None:
        found.add_row(Text(f"  {text}", style), f"{count:,}", f"{count / of:.1%}")

    heading("rank correlation, from -1 to 1", "overall", "in groups")
    for name, text in (("spearman", "Spearman"), ("kendall", "Kendall's tau-b")):
        found.add_row(f"  {text}", number(total[name]), number(total[f"{name}_in_groups"]))
    heading("pairs of rollouts within a group", f"{total['pairs']:,}")
    share("A and B order them alike", total["agreeing"], total["pairs"])
    share("flipped: one way by A, the other by B", total["flipped"], total["pairs"], "yellow")
    share("tied by A alone", total["tied_in_a"], total["pairs"])
    share("tied by B alone", total["tied_in_b"], total["pairs"])
    share("tied by both", total["tied_in_both"], total["pairs"])
    heading("groups with signal (rewards that differ)", f"{total['groups']:,}")
    share("by both", total["signal_in_both"], total["groups"])
    share("by A alone: lost with B in its place", total["signal_lost"], total["groups"], "yellow")
    share("by B alone: gained with B in its place", total["signal_gained"], total["groups"])
    share("by neither", total["signal_in_none"], total["groups"])
    heading("advantages, B's against A's", f"{total['rollouts']:,}")
    share("of the other sign", total["sign_flips"], total["rollouts"], "yellow")
    found.add_row("  mean |difference|", number(total["advantage_difference"]), "")
    return found


def _print_curve(console: "Console", rows: list[dict[str, Any]]) -> None:
    """The same by iteration."""
    curves = [_curve_point(row) for row in rows]
    cells = [
        [str(row["iteration"]), *(number(point[name], ".1%" if name in _SHARES else ".3f") for name in point)]
        for row, point in thinned(list(zip(rows, curves, strict=True)), _ROWS_SHOWN)
    ]
    console.print(table(("iteration", *curves[0]), cells))
    for name in ("in groups", "flipped", "|difference|"):
        points = [point[name] for point in thinned(curves, _SPARKLINE_POINTS)]
        console.print(f"  {name:<12}  {sparkline(points)}", highlight=False)
    if len(rows) > _ROWS_SHOWN:
        console.print(f"{_ROWS_SHOWN} of {len(rows)} iterations shown; --json has all", style="dim")


def _curve_point(row: dict[str, Any]) -> dict[str, float | None]:
    return {
        "Spearman": row["spearman"],
        "in groups": row["spearman_in_groups"],
        "flipped": row["flipped"] / row["pairs"],
        "tied in one": (row["tied_in_a"] + row["tied_in_b"]) / row["pairs"],
        "lose signal": row["signal_lost"] / row["groups"],
        "gain signal": row["signal_gained"] / row["groups"],
        "other sign": row["sign_flips"] / row["rollouts"],
        "|difference|": row["advantage_difference"],
    }


def _print_example(console: "Console", data: dict[str, Any], example: dict[str, Any]) -> None:
    from rich.text import Text

    where = f"iteration {example['iteration']}  group {example['group_id']}"
    flipped = f"{example['flipped']} of {example['pairs']} pairs flipped"
    console.print()
    console.rule(Text(f"{where}   {flipped}"), align="left", style="dim")
    console.print(Text(printable(example["prompt"]).rstrip()))
    cells = [
        [str(row["sample_id"]), *(number(row[name], "+.3f") for name in ("a", "b")), response_of(row)]
        for row in example["samples"]
    ]
    console.print(table(("sample", data["a"], data["b"], "response"), cells, left=("response",), plain=True))
