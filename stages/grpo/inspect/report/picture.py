"""picture: the curves as a PNG, small multiples, for a README or a chat."""

import io
import math
from typing import TYPE_CHECKING, Any

from grpo.inspect.report.curves import SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

COLORS = ("#2f6fde", "#d9622b", "#12937a", "#9a4fd0", "#c2347f", "#8a7a12", "#4b6378", "#c03a3a")
"""A colour a run, the same as in report.css; apart for most who see colours differently."""
STAGES = ("#2f6fde", "#12937a", "#e3b04b", "#9d7bd8", "#8a97a8")
_DASHES: tuple[Any, ...] = ("-", (0, (1, 1.2)), (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)))
_PANEL = (3.1, 2.1)  # inches
_DPI = 130


def picture(charts: list[dict[str, Any]], runs: list[str], columns: int = 4) -> bytes:
    """PNG of all charts that hold something: a colour a run, the ninth that of the first, a dash a series."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [chart for chart in charts if chart["series"]]
    columns = min(columns, max(len(shown), 1))
    rows = math.ceil(len(shown) / columns) or 1
    colors = {run: COLORS[index % len(COLORS)] for index, run in enumerate(runs)}
    # DejaVu is in matplotlib itself: the same picture on every machine.
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(columns * _PANEL[0], rows * _PANEL[1]), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        iterations = [x for chart in shown for series in chart["series"] for x in series["x"]]
        for axis, chart in zip(axes, shown, strict=False):
            _panel(axis, chart, colors)
            axis.set_xlim(min(iterations) - 0.5, max(iterations) + 0.5)
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        if len(runs) > 1:
            handles = [
                mpl.lines.Line2D([], [], color=color, lw=2, label=run) for run, color in colors.items()
            ]
            figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False, fontsize=9)
        figure.supxlabel("iteration", fontsize=8)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=_DPI, metadata={"Software": None})
    return sink.getvalue()


def _panel(axis: "Axes", chart: dict[str, Any], colors: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    unit = f" ({chart['unit']})" if chart["unit"] not in ("", SHARE) else ""
    axis.set_title(chart["title"] + unit, fontsize=9, loc="left")
    names = list(dict.fromkeys(series["name"] for series in chart["series"]))
    if chart["stacked"] and len(colors) == 1:
        axis.stackplot(*_stack(chart["series"]), labels=names, colors=STAGES, alpha=0.85, linewidth=0)
    else:
        _lines(axis, chart["series"], names, colors)
    if len(names) > 1:
        handles = None if len(colors) == 1 else _dashes(names)
        axis.legend(handles=handles, fontsize=7, frameon=False, ncols=2, loc="best", handlelength=1.6)
    values = [value for series in chart["series"] for value in series["y"] if value is not None]
    if min(values, default=0.0) >= 0:
        axis.set_ylim(bottom=0)
    if chart["unit"] == SHARE:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=7.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis: "Axes", every: list[dict[str, Any]], names: list[str], colors: dict[str, str]) -> None:
    """A line a series."""
    for series in every:
        color = colors[series["run"]]
        axis.plot(
            series["x"],
            series["y"],
            color=color,
            lw=1.6,
            linestyle=_DASHES[names.index(series["name"]) % len(_DASHES)],
            label=series["name"],
            marker="o" if len(series["x"]) == 1 else None,
            markersize=3,
        )
        if series["low"]:
            axis.fill_between(
                series["x"], series["low"], series["high"], color=color, alpha=0.15, linewidth=0
            )


def _dashes(names: list[str]) -> list["Line2D"]:
    """What each dash is, in no run's colour."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color="#555555", lw=1.6, linestyle=_DASHES[index % len(_DASHES)], label=name)
        for index, name in enumerate(names)
    ]


def _stack(every: list[dict[str, Any]]) -> tuple[list[int], list[list[float]]]:
    """x, then the y of each series at every x; 0 where a stage was not timed."""
    x = sorted({iteration for series in every for iteration in series["x"]})
    known = [dict(zip(series["x"], series["y"], strict=True)) for series in every]
    return x, [[values.get(iteration, 0.0) for iteration in x] for values in known]
