"""docs/tracking.md: what a tracker gets has the names that are listed there."""

import re
from pathlib import Path

from tests.pages.pages import DOCS

from grpo.artifacts import ARTIFACTS, ActiveRun
from grpo.config import load
from grpo.console import Console
from grpo.inspect.track import evaluation_of, numbers_of


def test_the_names_that_a_tracker_gets_are_the_listed_ones(complete_and_measured: Path) -> None:
    page = (DOCS / "tracking.md").read_text()
    listed = re.findall(r"`((?:reward|rewards|generate|update|seconds|evaluate)/[^`]+)`", page)
    patterns = [re.sub("<[a-z]+>", r"\\w+", name) for name in listed]
    folder = complete_and_measured
    run = ActiveRun(folder / ARTIFACTS, load(folder / "pipeline.yaml"), folder, Console(quiet=True))
    for name in [*numbers_of(run, 1), *evaluation_of(run, 2)]:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
