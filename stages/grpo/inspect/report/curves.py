"""curves: what a run looks like by iteration: one query a chart.

A curve is a title, a unit and a query; the page, the picture and docs/report.md take them from curve_list.py.
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


def read(connection: sql.Connection, runs: list[str], curves: tuple[Curve, ...]) -> list[dict[str, Any]]:
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
