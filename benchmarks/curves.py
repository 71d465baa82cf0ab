"""curves: some curves of a run as a picture, by the report's own code."""

from collections.abc import Collection
from pathlib import Path

from grpo.artifacts import ActiveRun
from grpo.config import load
from grpo.console import Console
from grpo.inspect import report
from grpo.inspect.report.picture import picture


def draw(folder: Path, configuration: Path, file: Path, titles: Collection[str]) -> None:
    """PNG of the charts with these titles, side by side, of the run in folder/artifacts."""
    run = ActiveRun(folder / "artifacts", load(configuration), configuration.parent, Console(quiet=True))
    drawn = [chart for chart in report.charts([run]) if chart["title"] in titles]
    file.write_bytes(picture(drawn, [run.name], columns=len(titles)))
