"""Tools are opened once, and those of two stages take turns on the accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo

from grpo.artifacts import Manifest, Run
from grpo.config import load as load_config
from grpo.console import Console
from grpo.pipeline import runner, stages
from grpo.pipeline.stages import Stage, Tools


def test_the_tool_of_the_stage_before_leaves_when_the_next_one_starts(project: Path) -> None:
    happened: list[str] = []

    @contextmanager
    def opened(name: str) -> Iterator[str]:
        happened.append(f"open {name}")
        yield f"tool of {name}"
        happened.append(f"close {name}")

    def stage(name: str) -> Stage:
        return replace(
            stages.STAGES[0],
            name=name,
            open_tool=lambda _: opened(name),
            release=lambda tool: happened.append(f"release {tool}"),
        )

    one, two, three = stage("one"), stage("two"), stage("three")
    run = Run(Path("artifacts"), load_config(Path("pipeline.yaml")), Path(), Console(quiet=True))
    with Tools(run) as tools:
        assert tools.get(one) == "tool of one"
        assert tools.get(one) == "tool of one"  # still its turn
        assert happened == ["open one"]
        tools.get(two)
        assert happened[1:] == ["release tool of one", "open two"]  # in this order: both may not fit
        tools.get(three)
        tools.get(one)  # open already, and only that of the stage before is released
        assert happened[3:] == ["release tool of two", "open three", "release tool of three"]
        del happened[:]
    assert happened == ["close three", "close two", "close one"]


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        # A reward model takes the place of the engine on the accelerator; functions need none.
        (False, ["open generate", "release generate", "open score", "release score"]),
        (True, ["open generate", "open score"]),
    ],
)
def test_an_evaluation_leaves_the_engine_where_it_is_unless_a_reward_needs_the_room(
    project: Path, monkeypatch: pytest.MonkeyPatch, beside: bool, expected: list[str]
) -> None:
    happened: list[str] = []

    @contextmanager
    def opened(name: str) -> Iterator[str]:
        happened.append(f"open {name}")
        yield name

    def noting(stage: Stage) -> Stage:
        return replace(
            stage,
            open_tool=lambda _: opened(stage.name),
            release=lambda tool: happened.append(f"release {tool}"),
        )

    monkeypatch.setattr(stages, "STAGES", tuple(noting(stage) for stage in stages.STAGES))
    run = Run(Path("artifacts"), load_config(Path("pipeline.yaml")), Path(), Console(quiet=True))
    with Tools(run) as tools:
        assert tools.borrow("generate") == "generate"
        assert tools.borrow("score", beside=beside) == "score"
        assert tools.get(stages.STAGES[0]) == "generate"  # the iteration behind the evaluation
    assert happened == expected


def test_every_stage_releases_its_tool_once_an_iteration(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def noting(stage: Stage) -> Stage:
        def run(*arguments: Any) -> Manifest:
            happened.append(stage.name)
            return stage.run(*arguments)

        def release(tool: Any) -> None:
            happened.append(f"-{stage.name}")
            stage.release(tool)

        return replace(stage, run=run, release=release)

    monkeypatch.setattr(stages, "STAGES", tuple(noting(stage) for stage in stages.STAGES))
    monkeypatch.setattr(runner, "STAGES", stages.STAGES)
    code, _, err = grpo("run")
    assert code == 0, err
    iteration = ["generate", "-generate", "score", "-score", "advantage", "-advantage", "update"]
    # The rewards are looked at before anything is sampled; what is last has nobody to leave for.
    assert happened == ["-score", *iteration, "-update", *iteration]
