"""curves: what a run looks like by iteration: one query a chart.

A curve is a title, a unit and a query; the page, the picture and docs/report.md take them from the list here.
A run that has no rows for a curve has no such chart, and the page says why.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from grpo import sql

SHARE = "share"
"""Unit of a number from 0 to 1, shown in per cent."""


@dataclass(frozen=True)
class Curve:
    """A chart. `statement` gives run, iteration, series and value, and perhaps the interval low to high."""

    title: str
    unit: str
    meaning: str
    absent: str
    """Why a run has no such curve."""
    statement: str
    section: str = "training"
    split: bool = False
    """Each series is a chart of its own, titled by the series."""
    stacked: bool = False


# Of KL, entropy and mismatch, the first step that was taken: there the weights are still those that sampled.
_FIRST_STEP = """
with taken as (
    select
        run,
        iteration,
        {column} as value,
        row_number() over (partition by run, iteration order by epoch, step)
            as place,
    from updates
    where not skipped
)

select
    run,
    iteration,
    '' as series,
    value,
from taken
where place = 1 and value is not null
order by run, iteration
"""

CURVES = (
    Curve(
        "Reward",
        "",
        "Mean of the weighted sum of the rewards, over scored rollouts.",
        "no advantages yet",
        """
        select run, iteration, '' as series,
            avg(reward order by group_id, sample_id) as value,
        from advantages
        where reward is not null
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Rewards by name",
        "",
        "Mean of this reward alone, without its weight.",
        "no rewards yet",
        """
        select run, iteration, name as series,
            avg(value order by group_id, sample_id) as value,
            bool_and(value in (0, 1)) as binary,
        from rewards
        where status = 'ok'
        group by run, iteration, name
        order by run, min(name), iteration
        """,
        split=True,
    ),
    Curve(
        "KL to the reference",
        "nats",
        "How far the policy has moved, per response token as the loss sees it.",
        "the loss has no KL term (update.kl_coefficient is 0)",
        _FIRST_STEP.format(column="kl"),
    ),
    Curve(
        "Entropy",
        "nats",
        "Mean entropy per response token; near 0, sampling no longer explores.",
        "no update yet",
        _FIRST_STEP.format(column="entropy"),
    ),
    Curve(
        "Response length",
        "tokens",
        "Mean number of response tokens.",
        "no rollouts yet",
        """
        select run, iteration, '' as series, avg(response_tokens) as value,
        from rollouts
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Truncated",
        SHARE,
        "Share of responses cut off at max_new_tokens.",
        "no rollouts yet",
        """
        select run, iteration, '' as series,
            avg((finish_reason = 'length')::integer) as value,
        from rollouts
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Clipped",
        SHARE,
        "Share of ratios beyond the clip range on the side where clipping stops the gradient.",
        "no update yet, or none that clips",
        """
        select run, iteration, series, avg(value order by epoch, step) as value,
        from (
            select run, iteration, epoch, step, 'low' as series,
                clip_fraction_low as value,
            from updates where not skipped
            union all
            select run, iteration, epoch, step, 'high' as series,
                clip_fraction_high as value,
            from updates where not skipped
        )
        where value is not null
        group by run, iteration, series
        order by run, series desc, iteration
        """,
    ),
    Curve(
        "Mismatch",
        "nats",
        "Mean distance of sampler and learner per token, before any step; above 0.05 mind it.",
        "no update yet",
        _FIRST_STEP.format(column="mismatch_mean"),
    ),
    Curve(
        "Groups without signal",
        SHARE,
        "Share of groups whose rewards are all equal: their advantages are 0.",
        "no advantages yet",
        """
        select run, iteration, '' as series,
            avg((group_std = 0)::integer) as value,
        from (
            select distinct run, iteration, group_id, group_std,
            from advantages
            where group_std is not null
        )
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Gradient norm",
        "",
        "Before clipping at max_grad_norm; mean over the steps taken.",
        "no update yet",
        """
        select run, iteration, '' as series,
            avg(grad_norm order by epoch, step) as value,
        from updates
        where not skipped and grad_norm is not null
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Seconds by stage",
        "s",
        "Where the time of an iteration goes.",
        "nothing was timed",
        """
        select run, iteration, stage as series, sum(seconds) as value,
        from timings
        where iteration is not null
        group by run, iteration, stage
        order by run,
            list_position(['generate', 'score', 'advantage', 'update'], stage),
            stage, iteration
        """,
        stacked=True,
    ),
    Curve(
        "Pass rate of held-out prompts",
        SHARE,
        "Chance that one of k responses passes: k = 1 and the largest k; 95 % intervals by prompt.",
        "no evaluation yet",
        """
        select run, iteration, 'pass@' || k as series,
            pass_at[k] as value, pass_at_low[k] as low, pass_at_high[k] as high,
        from (
            select *,
                unnest(list_distinct([1, list_max(map_keys(pass_at))])) as k,
            from evals
            where pass_at is not null
        )
        order by run, k, iteration
        """,
        section="evaluation",
    ),
    Curve(
        "Reward of held-out prompts",
        "",
        "Mean of the weighted sum of the rewards; 95 % intervals by prompt.",
        "no evaluation yet",
        """
        select run, iteration, '' as series,
            reward as value, reward_low as low, reward_high as high,
        from evals
        where reward is not null
        order by run, iteration
        """,
        section="evaluation",
    ),
    Curve(
        "Response length on held-out prompts",
        "tokens",
        "Mean number of response tokens.",
        "no evaluation yet",
        """
        select run, iteration, '' as series, response_tokens as value,
        from evals
        order by run, iteration
        """,
        section="evaluation",
    ),
)


def read(
    connection: sql.Connection, runs: list[str], curves: tuple[Curve, ...] = CURVES
) -> list[dict[str, Any]]:
    """Every chart with its series, those of the first of `runs` first: what the page and the picture draw.

    A series has run, name, x (iterations), y, and low and high where the query gives them. A chart without
    series is there too: its `absent` says why it is empty.
    """
    charts: list[dict[str, Any]] = []
    for curve in curves:
        chart = {name: value for name, value in asdict(curve).items() if name != "statement"}
        rows = sql.query(connection, curve.statement).to_pylist()
        rows.sort(key=lambda row: runs.index(row["run"]))
        if not curve.split or not rows:
            charts.append({**chart, "series": _series(rows)})
            continue
        for name in dict.fromkeys(row["series"] for row in rows):
            own = [{**row, "series": ""} for row in rows if row["series"] == name]
            charts.append({**chart, **_named(name, own), "series": _series(own)})
    return charts


def _series(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    columns = {"x": "iteration", "y": "value", "low": "low", "high": "high"}
    for row in rows:
        empty = {"run": row["run"], "name": row["series"], **{name: [] for name in columns}}
        series = found.setdefault((row["run"], row["series"]), empty)
        for name, column in columns.items():
            if column in row:
                series[name].append(row[column] if name == "x" else _finite(row[column]))
    return [{name: value for name, value in series.items() if value != []} for series in found.values()]


def _finite(value: Any) -> float | None:
    """A number that can be drawn; None, which is a gap, for NaN and infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def _named(name: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """What differs in the chart of one reward; where it gives 0 and 1 only, the mean is a pass rate."""
    if all(row["binary"] for row in rows):
        meaning = "Share of rollouts to which this reward gave 1, the others having got 0."
        return {"title": f"Pass rate: {name}", "unit": SHARE, "meaning": meaning}
    return {"title": f"Reward: {name}"}
