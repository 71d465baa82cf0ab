"""status: iterations x stages of a run, and what an iteration came to."""

from collections.abc import Iterable
from typing import Any

from grpo.artifacts import ActiveRun
from grpo.console import interval, number, stdout_console, table
from grpo.inspect import metrics
from grpo.inspect.evaluations import numbers_of
from grpo.pipeline.stages import STAGES
from grpo.pipeline.states import State, evaluation_states, states, unfinished

MISMATCH_WARNING = 0.05  # nats per token; float32 gives 1e-6, bfloat16 about 1e-2
_ROWS_SHOWN = 20
_STYLES = {"done": "green", "partial": "yellow", "stale": "red", "changed": "yellow", "missing": "dim"}
Row = dict[str, Any]


def describe(run: ActiveRun) -> dict[str, Any]:
    """Everything `grpo status` shows, as plain data: the run's configuration decides what differs."""
    with run.steady():
        return _described(run, states(run))


def _described(run: ActiveRun, present: dict[int, dict[str, State]]) -> dict[str, Any]:
    numbers = metrics.kept_of(run, present)
    return {
        "run": run.name,
        "iterations": [
            {
                "iteration": iteration,
                "stages": _stages(run, iteration, by_stage),
                **numbers[iteration],
                **metrics.times_of(run, iteration),
            }
            for iteration, by_stage in present.items()
        ],
        "evaluations": [
            {"state": state.name, "why": state.why, **numbers_of(run, policy)}
            for policy, state in evaluation_states(run, present).items()
            if state.name != "missing"
        ],
        "configured": run.config.iterations,
    }


def _stages(run: ActiveRun, iteration: int, by_stage: dict[str, State]) -> Row:
    stages = {}
    for stage in STAGES:
        state = by_stage[stage.name]
        begun = state.name == "missing" and unfinished(run, stage, iteration)
        stages[stage.name] = {"state": state.name, "why": "begun, not committed" if begun else state.why}
    return stages


def line_of(run: ActiveRun, iteration: int) -> str:
    """One line for the log of `grpo run`."""
    numbers = metrics.kept_of(run, [iteration])[iteration]
    times = metrics.times_of(run, iteration)
    known = [
        f"{name} {numbers[column]:.{digits}f}"
        for name, column, digits in (
            *(("reward", "reward", 3), ("kl", "kl", 4), ("entropy", "entropy", 3)),
            ("length", "response_tokens", 1),
        )
        if numbers[column] is not None
    ]
    tokens, generating = numbers["tokens"], times["stage_seconds"]["generate"]
    speed = f"  {tokens / generating:,.0f} tok/s" if tokens and generating else ""
    return f"iteration {iteration:>4}  {'  '.join(known)}  {times['seconds'] or 0:.2f} s{speed}"


def print_status(run: ActiveRun, every: bool) -> None:
    """Print the table: the last iterations, or all with `every`; then why something is not done."""
    data = describe(run)
    rows = data["iterations"]
    shown = rows if every else rows[-_ROWS_SHOWN:]
    columns = ["iteration", *(stage.name for stage in STAGES), "reward", "kl", "length", "mismatch"]
    cells = [
        [
            str(row["iteration"]),
            *(_state(stage["state"], row["stage_seconds"][name]) for name, stage in row["stages"].items()),
            number(row["reward"]),
            number(row["kl"], ".4f"),
            number(row["response_tokens"], ".1f"),
            number(row["mismatch_mean"], ".1e"),
        ]
        for row in shown
    ]
    console = stdout_console()
    console.print(table(columns, cells, title=f"run {run.name}: stages with their seconds"))
    if len(rows) > len(shown):
        console.print(f"{len(rows) - len(shown)} earlier iterations not shown (--all)", style="dim")
    _print_reasons(console, rows)
    _print_evaluations(console, data["evaluations"], every)


def _print_evaluations(console: Any, rows: list[Row], every: bool) -> None:
    """Print what policies were measured to be; then why one of them is not as it would be now."""
    if not rows:
        return
    columns = ("policy", "evaluate", "pass@1", "95 % interval", "pass@n", "n", "reward", "length")
    cells = []
    for row in rows if every else rows[-_ROWS_SHOWN:]:
        shares = row["pass_at"] or {}
        most = list(shares)[-1] if shares else ""
        ends = (row["pass_at_low"]["1"], row["pass_at_high"]["1"]) if shares else (None, None)
        cells.append(
            [
                str(row["policy"]),
                _state(row["state"], row["seconds"]),
                number(shares.get("1")),
                interval(*ends),
                number(shares.get(most)),
                most,
                number(row["reward"]),
                number(row["response_tokens"], ".1f"),
            ]
        )
    console.print(table(columns, cells, title="policies, measured"))
    told = [(f"evaluate {row['state']}: {row['why']}", row["policy"]) for row in rows if row["why"]]
    _print_told(console, told, "policy", "policies")


def _state(state: str, seconds: float | None) -> Any:
    from rich.text import Text

    return Text.assemble((state, _STYLES[state]), f" {number(seconds, '.2f')}", no_wrap=True)


def _print_told(console: Any, told: Iterable[tuple[str, int]], noun: str, nouns: str) -> None:
    """Each text once, behind the numbers that it is said of."""
    places: dict[str, list[int]] = {}
    for text, place in told:
        places.setdefault(text, []).append(place)
    for text, where in places.items():
        several = f"{len(where)} {nouns}, {where[0]} to {where[-1]}"
        begin = f"{noun} {where[0]}" if len(where) == 1 else several
        console.print(f"{begin}: {text}", markup=False, highlight=False, soft_wrap=True)


def _print_reasons(console: Any, rows: list[Row]) -> None:
    """Say why something is not done: causes, and how many outputs follow from them."""
    said = [
        (name, stage, row["iteration"])
        for row in rows
        for name, stage in row["stages"].items()
        if stage["why"]
    ]
    causes = [each for each in said if not each[1]["why"].endswith(" is stale")]
    told = ((f"{name} {stage['state']}: {stage['why']}", iteration) for name, stage, iteration in causes)
    _print_told(console, told, "iteration", "iterations")
    if following := len(said) - len(causes):
        console.print(f"{following} more are stale because they read what is stale", highlight=False)
    apart = [row["iteration"] for row in rows if (row["mismatch_mean"] or 0) > MISMATCH_WARNING]
    if apart:
        console.print(
            f"warning: sampler and learner disagree by more than {MISMATCH_WARNING} nats per token in"
            f" iterations {', '.join(map(str, apart))}; see `mismatch` in samples",
            style="yellow",
        )
