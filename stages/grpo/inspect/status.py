"""status: iterations x stages of a run, and what an iteration came to."""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from grpo.artifacts import ActiveRun, best_of, is_durable, read_stop
from grpo.console import interval, iterations_text, number, printable, stdout_console, table
from grpo.inspect import metrics, policies
from grpo.inspect.evaluations import numbers_of
from grpo.pipeline.stages import STAGES
from grpo.pipeline.states import State, evaluation_states, states, unfinished

MISMATCH_WARNING = 0.05  # nats per token
MISMATCH_BANDS = (
    (1e-4, "float32 on both sides"),
    (1e-2, "bfloat16 on one side"),
    (
        MISMATCH_WARNING,
        "much for bfloat16, as of some models, or sampling that is cut; update.sampler_correction",
    ),
    (math.inf, "engine and learner do not compute the same"),
)
"""What a mean mismatch is: from below each limit on, without a gap (docs/reading-a-run.md)."""
_ROWS_SHOWN = 20
_STYLES = {"done": "green", "partial": "yellow", "stale": "red", "changed": "yellow", "missing": "dim"}
Row = dict[str, Any]


def describe(run: ActiveRun) -> dict[str, Any]:
    """Everything `grpo status` shows, as plain data: the run's configuration decides what differs."""
    with run.steady():
        present = states(run)
        numbers = metrics.kept_of(run, present)
        best, stop = best_of(run, run.evaluations()), read_stop(run)
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
            "best": None if best is None else {**asdict(best), "kept": is_durable(run, best.policy)},
            "policies": policies.describe(run),
            "stopped": None if stop is None else {**asdict(stop), "why": str(stop)},
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
    texts = {
        "reward": number(numbers["reward"]),
        "kl": number(numbers["kl"], ".4f"),
        "entropy": number(numbers["entropy"]),
        "length": number(numbers["response_tokens"], ".1f"),
    }
    known = "  ".join(f"{name} {text}" for name, text in texts.items() if text)
    tokens, seconds = numbers["tokens"], times["seconds"]
    speed = f"  {tokens / seconds:,.0f} tok/s" if tokens and seconds else ""
    return f"iteration {iteration:>4}  {known}  {seconds or 0:.2f} s{speed}"


def print_all(every_run: list[dict[str, Any]], every: bool) -> None:
    """print_status() of each."""
    for data in every_run:
        print_status(data, every)


def print_status(data: dict[str, Any], every: bool) -> None:
    """Print the tables: the last iterations and policies, or all with `every`; and why one is not done."""
    rows, measured = data["iterations"], data["evaluations"]
    first = 0 if every else -_ROWS_SHOWN
    columns = ["iteration", *(stage.name for stage in STAGES), "reward", "kl", "length", "mismatch"]
    console = stdout_console()
    title = f"run {data['run']}: stages with their seconds"
    console.print(table(columns, map(_cells, rows[first:]), title=title))
    if not every and len(rows) > _ROWS_SHOWN:
        console.print(f"{len(rows) - _ROWS_SHOWN} earlier iterations not shown (--all)", style="dim")
    _print_reasons(console, rows)
    _print_mismatch(console, rows)
    if data["policies"]["newest"]:
        console.print(policies.line_of(data["policies"]), soft_wrap=True)
    if measured:
        columns = ["policy", "evaluate", "pass", "pass@1", "95 % interval", "pass@n", "n", "reward", "length"]
        console.print(table(columns, map(_measured_cells, measured[first:]), title="policies, measured"))
        _print_best(console, data)
        told = [(f"evaluate {row['state']}: {row['why']}", row["policy"]) for row in measured if row["why"]]
        _print_told(console, told, "policy", "policies")


def _print_best(console: Any, data: dict[str, Any]) -> None:
    """The best policy, and what ended the run."""
    if best := data["best"]:
        kept = "" if best["kept"] else "; it is not on disk"
        text = f"best: policy {best['policy']}, {best['value']:.3f} {best['measure']}{kept}"
        console.print(printable(text), soft_wrap=True)
    if stop := data["stopped"]:
        console.print(printable(f"{stop['why']} ({stop['at']})"), soft_wrap=True)


def _cells(row: Row) -> list[Any]:
    return [
        str(row["iteration"]),
        *(_state(stage["state"], row["stage_seconds"][name]) for name, stage in row["stages"].items()),
        number(row["reward"]),
        number(row["kl"], ".4f"),
        number(row["response_tokens"], ".1f"),
        number(row["mismatch_mean"], ".1e"),
    ]


def _measured_cells(row: Row) -> list[Any]:
    shares, low, high = (row[name] or {} for name in ("pass_at", "pass_at_low", "pass_at_high"))
    most = max(shares, key=int, default="")
    return [
        str(row["policy"]),
        _state(row["state"], row["seconds"]),
        f"{row['pass_reward']} >= {row['pass_threshold']:g}",
        number(shares.get("1")),
        interval(low.get("1"), high.get("1")),
        number(shares.get(most)),
        most,
        number(row["reward"]),
        number(row["response_tokens"], ".1f"),
    ]


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
        line = f"{noun} {where[0]}: {text}" if len(where) == 1 else f"{several}: {text}"
        console.print(printable(line), soft_wrap=True)


def _band(mismatch: float | None) -> int:
    """The place in MISMATCH_BANDS of a mean; 0 where it was not measured."""
    return bisect_left([limit for limit, _ in MISMATCH_BANDS], mismatch or 0)


def mismatch_says(mean: float) -> str:
    """What a mean mismatch is."""
    return MISMATCH_BANDS[_band(mean)][1]


def _print_reasons(console: Any, rows: list[Row]) -> None:
    """Say why something is not done: causes, and how many outputs follow from them."""
    said = [
        (f"{name} {stage['state']}: {stage['why']}", row["iteration"])
        for row in rows
        for name, stage in row["stages"].items()
        if stage["why"]
    ]
    causes = [(text, iteration) for text, iteration in said if not text.endswith(" is stale")]
    _print_told(console, causes, "iteration", "iterations")
    if following := len(said) - len(causes):
        console.print(f"{following} more are stale because they read what is stale")


def _print_mismatch(console: Any, rows: list[Row]) -> None:
    """Say in which iterations sampler and learner disagree, from where it matters on.

    Not where updates lie between them, of which no more than that can be said.
    """
    rows = [row for row in rows if not row["policy_lag"]]
    much = [row["iteration"] for row in rows if _band(row["mismatch_mean"]) == 2]
    if much:
        (low, _), (high, says) = MISMATCH_BANDS[1:3]
        where = iterations_text([much[0], much[-1]])
        console.print(f"mismatch from {low:g} to {high:g} in {len(much)} of {where}: {says}", soft_wrap=True)
    apart = [str(row["iteration"]) for row in rows if (row["mismatch_mean"] or 0) > MISMATCH_WARNING]
    if apart:
        console.print(
            f"warning: sampler and learner disagree by more than {MISMATCH_WARNING} nats per token in"
            f" iterations {', '.join(apart)}; see `mismatch` in samples",
            style="yellow",
        )
