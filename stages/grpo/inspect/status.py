"""status: iterations x stages of a run, and what an iteration came to."""

from typing import Any

from grpo.artifacts import STAGE_OUTPUTS, Manifest, Run
from grpo.console import stdout_console
from grpo.inspect.evaluations import interval, numbers_of
from grpo.pipeline.stages import STAGES
from grpo.pipeline.states import State, evaluation_states, states, unfinished

MISMATCH_WARNING = 0.05  # nats per token; float32 gives 1e-6, bfloat16 about 1e-2
_ROWS_SHOWN = 20
_STYLES = {"done": "green", "partial": "yellow", "stale": "red", "changed": "yellow", "missing": "dim"}


def describe(run: Run) -> dict[str, Any]:
    """Everything `grpo status` shows, as plain data: the run's configuration decides what differs."""
    present = states(run)
    return {
        "run": run.name,
        "iterations": [_describe_iteration(run, number, by_stage) for number, by_stage in present.items()],
        "evaluations": [
            {"state": state.name, "why": state.why, **numbers_of(run, policy)}
            for policy, state in evaluation_states(run, present).items()
            if state.name != "missing"
        ],
        "configured": run.config.iterations,
    }


def summary_of(run: Run, iteration: int) -> dict[str, Any]:
    """Reward, KL, length, mismatch and seconds per stage of one iteration; null where not known yet."""
    manifests = {output: run.manifest(output, iteration) for output in STAGE_OUTPUTS}
    places = {
        "reward": ("advantages", "reward_mean"),
        "kl": ("update", "kl"),
        "entropy": ("update", "entropy"),
        "mismatch": ("update", "mismatch_mean"),
        "length": ("rollouts", "mean_response_tokens"),
        "truncated": ("rollouts", "truncated_fraction"),
    }
    numbers = {name: _number(manifests[output], key) for name, (output, key) in places.items()}
    return {**numbers, "seconds": {stage.name: _seconds(run, stage.output, iteration) for stage in STAGES}}


def line_of(run: Run, iteration: int) -> str:
    """One line for the log of `grpo run`."""
    numbers = summary_of(run, iteration)
    known = [
        f"{name} {numbers[name]:.{digits}f}"
        for name, digits in (("reward", 3), ("kl", 4), ("entropy", 3), ("length", 1))
        if numbers[name] is not None
    ]
    seconds = sum(value for value in numbers["seconds"].values() if value is not None)
    generating = numbers["seconds"]["generate"]
    tokens = _number(run.manifest("rollouts", iteration), "response_tokens")
    speed = f"  {tokens / generating:,.0f} tok/s" if tokens and generating else ""
    return f"iteration {iteration:>4}  {'  '.join(known)}  {seconds:.2f} s{speed}"


def print_status(run: Run, every: bool) -> None:
    """Print the table: the last iterations, or all with `every`; then why something is not done."""
    from rich import box
    from rich.table import Table

    data = describe(run)
    table = Table(
        title=f"run {run.name}: stages with their seconds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("iteration", justify="right")
    for stage in STAGES:
        table.add_column(stage.name, justify="right", no_wrap=True)
    for name in ("reward", "kl", "length", "mismatch"):
        table.add_column(name, justify="right")
    rows = data["iterations"]
    shown = rows if every else rows[-_ROWS_SHOWN:]
    for row in shown:
        cells = [_stage_cell(stage["state"], row["seconds"][name]) for name, stage in row["stages"].items()]
        numbers = [
            _text(row["reward"], ".3f"),
            _text(row["kl"], ".4f"),
            _text(row["length"], ".1f"),
            _text(row["mismatch"], ".1e"),
        ]
        table.add_row(str(row["iteration"]), *cells, *numbers)
    console = stdout_console()
    console.print(table)
    if len(rows) > len(shown):
        console.print(f"{len(rows) - len(shown)} earlier iterations not shown (--all)", style="dim")
    _print_reasons(console, rows)
    _print_evaluations(console, data["evaluations"], every)


def _print_evaluations(console: Any, rows: list[dict[str, Any]], every: bool) -> None:
    """Print what policies were measured to be; then why one of them is not as it would be now."""
    if not rows:
        return
    from rich import box
    from rich.table import Table

    table = Table(title="policies, measured", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("policy", "evaluate", "pass@1", "95 % interval", "pass@n", "n", "reward", "length"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows if every else rows[-_ROWS_SHOWN:]:
        shares = row["pass_at"] or {}
        most = list(shares)[-1] if shares else ""
        table.add_row(
            str(row["policy"]),
            _stage_cell(row["state"], row["seconds"]),
            _text(shares.get("1"), ".3f"),
            interval(row["pass_at_low"]["1"], row["pass_at_high"]["1"]).strip(" ()") if shares else "",
            _text(shares.get(most), ".3f"),
            most,
            _text(row["reward"], ".3f"),
            _text(row["response_tokens"], ".1f"),
        )
    console.print(table)
    told: dict[str, list[int]] = {}
    for row in rows:
        if row["why"]:
            told.setdefault(f"evaluate {row['state']}: {row['why']}", []).append(row["policy"])
    for text, where in told.items():
        place = (
            f"policy {where[0]}" if len(where) == 1 else f"{len(where)} policies, {where[0]} to {where[-1]}"
        )
        console.print(f"{place}: {text}", markup=False, highlight=False, soft_wrap=True)


def _stage_cell(state: str, seconds: float | None) -> str:
    return f"[{_STYLES[state]}]{state}[/] {_text(seconds, '.2f')}"


def _print_reasons(console: Any, rows: list[dict[str, Any]]) -> None:
    """Say why something is not done: causes, and how many outputs follow from them."""
    following = 0
    told: dict[str, list[int]] = {}
    for row in rows:
        for name, stage in row["stages"].items():
            if stage["why"].endswith(" is stale"):
                following += 1
            elif stage["why"]:
                told.setdefault(f"{name} {stage['state']}: {stage['why']}", []).append(row["iteration"])
    for text, where in told.items():
        place = (
            f"iteration {where[0]}"
            if len(where) == 1
            else f"{len(where)} iterations, {where[0]} to {where[-1]}"
        )
        console.print(f"{place}: {text}", markup=False, highlight=False, soft_wrap=True)
    if following:
        console.print(f"{following} more are stale because they read what is stale", highlight=False)
    apart = [row["iteration"] for row in rows if (row["mismatch"] or 0) > MISMATCH_WARNING]
    if apart:
        console.print(
            f"warning: sampler and learner disagree by more than {MISMATCH_WARNING} nats per token in"
            f" iterations {', '.join(map(str, apart))}; see `mismatch` in samples",
            style="yellow",
        )


def _describe_iteration(run: Run, iteration: int, by_stage: dict[str, State]) -> dict[str, Any]:
    stages = {}
    for stage in STAGES:
        state = by_stage[stage.name]
        begun = state.name == "missing" and unfinished(run, stage, iteration)
        stages[stage.name] = {"state": state.name, "why": "begun, not committed" if begun else state.why}
    return {"iteration": iteration, "stages": stages, **summary_of(run, iteration)}


def _number(manifest: Manifest | None, key: str) -> float | None:
    value = manifest.summary.get(key) if manifest else None
    return None if value is None else float(value)


def _seconds(run: Run, output: str, iteration: int) -> float | None:
    seconds = run.timings(output, iteration)
    return sum(seconds.values()) if seconds else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
