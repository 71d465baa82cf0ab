"""curves: what runs look like by iteration: the rows of curves.sql as the charts of curve_list.py.

A run that has no rows for a curve has no such chart, and the page says why.
"""

from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from typing import Any

from grpo import sql
from grpo.console import finite
from grpo.inspect.report.curve_list import CURVES, SHARE


def read(connection: sql.Connection, runs: list[str]) -> list[dict[str, Any]]:
    """Every chart with its series, those of the first of `runs` first: what the page and the picture draw.

    A series has run, name, x (iterations), y, and low and high where curves.sql gives them. A chart without
    series is there too: its `absent` says why it is empty.
    """
    rows = sql.query(connection, sql.own_text("inspect/report/curves")).to_pylist()
    rows.sort(key=lambda row: runs.index(row["run"]))
    charts: list[dict[str, Any]] = []
    for curve in CURVES:
        chart = asdict(curve)
        own = [row for row in rows if row["curve"] == curve.name]
        if not curve.split or not own:
            charts.append({**chart, "series": _series(own)})
            continue
        for name in dict.fromkeys(row["series"] for row in own):
            members = [{**row, "series": ""} for row in own if row["series"] == name]
            charts.append({**chart, **_named(name, members), "series": _series(members)})
    return charts


def _series(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for (run, name), members in groupby(rows, key=itemgetter("run", "series")):
        own = list(members)
        series = {"run": run, "name": name, "x": [row["iteration"] for row in own]}
        series["y"] = [finite(row["value"]) for row in own]
        for end in ("low", "high"):
            if any(row[end] is not None for row in own):
                series[end] = [finite(row[end]) for row in own]
        found.append(series)
    return found


def _named(name: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """What differs in the chart of one reward; where it gives 0 and 1 only, the mean is a pass rate."""
    if all(row["is_binary"] for row in rows):
        meaning = "Share of rollouts to which this reward gave 1, the others having got 0."
        return {"title": f"Pass rate: {name}", "unit": SHARE, "meaning": meaning}
    return {"title": f"Reward: {name}"}
