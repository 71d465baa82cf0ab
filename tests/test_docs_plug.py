"""The pages on data, export and tracking: their configurations are valid, their commands and names exist."""

import re
from pathlib import Path

import pytest
import yaml
from tests.conftest import Grpo

from grpo.artifacts import ARTIFACTS, Run
from grpo.config import Config, load
from grpo.console import Console
from grpo.track import evaluation_of, numbers_of

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("page", "count"), [("data.md", 3), ("tracking.md", 1)])
def test_each_configuration_is_valid(page: str, count: int) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == count
    rest = {
        "run": "r",
        "model": "m",
        "prompts": {"source": "arithmetic"},
        "score": {"rewards": [{"function": "exact_answer"}]},
    }
    for block in blocks:
        Config.model_validate({**rest, **yaml.safe_load(block)})


@pytest.mark.parametrize("page", ["data.md", "export.md", "tracking.md"])
def test_each_command_knows_its_options(page: str, grpo: Grpo) -> None:
    commands = re.findall(r"^grpo (\w+)(.*?)(?:#.*)?$", (DOCS / page).read_text(), re.MULTILINE)
    assert commands
    for command, rest in commands:
        code, out, _ = grpo(command, "--help")
        assert code == 0, command
        assert all(option in out for option in re.findall(r"--[a-z-]+", rest)), (command, rest)


def test_the_names_that_a_tracker_gets_are_the_listed_ones(complete_and_measured: Path) -> None:
    listed = re.findall(
        r"`((?:reward|rewards|generate|update|seconds|evaluate)/[^`]+)`", (DOCS / "tracking.md").read_text()
    )
    patterns = [re.sub("<[a-z]+>", r"\\w+", name) for name in listed]
    folder = complete_and_measured
    run = Run(folder / ARTIFACTS, load(folder / "pipeline.yaml"), folder, Console(quiet=True))
    for name in [*numbers_of(run, 1), *evaluation_of(run, 2)]:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
