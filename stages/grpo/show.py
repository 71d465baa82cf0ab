"""show: rollouts as a person reads them: a prompt, its K responses, rewards and advantages."""

from itertools import groupby
from typing import Any

from grpo import sql
from grpo.artifacts import Run
from grpo.console import printable, stdout_console
from grpo.errors import UsageError

_QUERY = """
select * from samples
where iteration = $iteration and group_id in (
    select distinct group_id from samples
    where iteration = $iteration and ({where})
    order by group_id
    limit $groups
)
order by group_id, sample_id
"""


def fetch(run: Run, iteration: int | None, where: str | None, groups: int) -> list[dict[str, Any]]:
    """Rows of `samples` of the first groups that meet `where`; of the newest iteration by default.

    Raises UsageError (exit 2) for an iteration that is not there and for a condition DuckDB refuses.
    """
    have = [number for number in run.iterations() if run.manifest("rollouts", number)]
    if not have:
        raise UsageError(f"run {run.name}: holds no rollouts yet")
    chosen = have[-1] if iteration is None else iteration
    if chosen not in have:
        raise UsageError(f"--iteration {chosen}: run {run.name} has rollouts of {have[0]} to {have[-1]}")
    statement = _QUERY.format(where=where or "true")
    parameters = {"iteration": chosen, "groups": groups}
    rows: list[dict[str, Any]] = sql.read([run], statement, parameters, chosen).to_pylist()
    return rows


def print_rollouts(rows: list[dict[str, Any]]) -> None:
    """Print rollouts by group. What a model wrote is shown as text, never as markup."""
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    for group_id, members in groupby(rows, key=lambda row: row["group_id"]):
        samples = list(members)
        first = samples[0]
        answer = "" if first["answer"] is None else f"   answer: {first['answer'].splitlines()[-1]}"
        mean, deviation = first["group_mean"], first["group_std"]
        spread = "" if mean is None else f"   reward {mean:.3f} ± {deviation or 0:.3f}"
        console.rule(f"iteration {first['iteration']}  group {group_id}{spread}", align="left")
        console.print(Text(printable(first["prompt"]).rstrip()), Text(printable(answer), style="dim"))
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("sample", "reward", "advantage", "tokens", "end"):
            table.add_column(name, justify="right")
        table.add_column("response", overflow="fold")
        for row in samples:
            table.add_row(
                str(row["sample_id"]),
                _number(row["reward"]),
                _number(row["advantage"], row["reason"]),
                str(row["response_tokens"]),
                row["finish_reason"],
                Text(printable(row["response"])),
            )
        console.print(table)
        console.print()


def _number(value: float | None, instead: str | None = None) -> str:
    return (instead or "") if value is None else f"{value:+.3f}"
