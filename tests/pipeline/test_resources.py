"""Resources are opened once, and those of two stages take turns on the accelerator."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.conftest import Grpo

from grpo.artifacts import POLICY, ActiveRun, held_part
from grpo.config import load as load_config
from grpo.console import Console
from grpo.errors import EngineError
from grpo.pipeline import stages
from grpo.pipeline.resources import Resources
from grpo.pipeline.stages import Stage, StageModule


def fake(**functions: Any) -> StageModule:
    """The heavy half of a stage that has these functions alone."""
    return cast(StageModule, SimpleNamespace(**functions))


def test_the_resource_of_the_stage_before_leaves_when_the_next_one_starts(project: Path) -> None:
    happened: list[str] = []

    @contextmanager
    def opened(name: str) -> Iterator[str]:
        happened.append(f"open {name}")
        yield f"resource of {name}"
        happened.append(f"close {name}")

    def stage(name: str) -> Stage:
        return replace(
            stages.STAGES[0],
            name=name,
            load=lambda: fake(
                open_resource=lambda *_: opened(name),
                release=lambda resource: happened.append(f"release {resource}"),
            ),
        )

    one, two, three = stage("one"), stage("two"), stage("three")
    run = ActiveRun(Path("artifacts"), load_config(Path("pipeline.yaml")), Path(), Console(quiet=True))
    with Resources(run) as resources:
        assert resources.get(one) == "resource of one"
        assert resources.get(one) == "resource of one"  # still its turn
        assert happened == ["open one"]
        resources.get(two)
        assert happened[1:] == ["release resource of one", "open two"]  # in this order: both may not fit
        resources.get(three)
        resources.get(one)  # open already, and only that of the stage before is released
        assert happened[3:] == ["release resource of two", "open three", "release resource of three"]
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
            load=lambda: fake(
                open_resource=lambda *_: opened(stage.name),
                release=lambda resource: happened.append(f"release {resource}"),
            ),
        )

    for stage in stages.STAGES:
        monkeypatch.setitem(stages.BY_NAME, stage.name, noting(stage))
    run = ActiveRun(Path("artifacts"), load_config(Path("pipeline.yaml")), Path(), Console(quiet=True))
    with Resources(run) as resources:
        assert resources.borrow("generate") == "generate"
        assert resources.borrow("score", beside=beside) == "score"
        assert resources.get(stages.BY_NAME["generate"]) == "generate"  # the iteration behind the evaluation
    assert happened == expected


def test_every_stage_releases_its_resource_once_an_iteration(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def noting(call: Any, text: str) -> Any:
        def noted(*arguments: Any) -> Any:
            happened.append(text)
            return call(*arguments)

        return noted

    for stage in stages.STAGES:
        work = import_module(f"grpo.{stage.name}.stage")
        for name, sign in (("produce", ""), ("release", "-")):
            monkeypatch.setattr(work, name, noting(getattr(work, name), sign + stage.name))
    code, _, err = grpo("run")
    assert code == 0, err
    iteration = ["generate", "-generate", "score", "-score", "advantage", "-advantage", "update"]
    # The rewards are looked at before anything is sampled; what is last has nobody to leave for.
    assert happened == ["-score", *iteration, "-update", *iteration]


def fails_with(lent: AbstractContextManager[object], taken: list[object]) -> None:
    with lent as source:
        taken.append(source)
        raise EngineError("the engine fails")  # the learner leaves all the same


@pytest.mark.parametrize(
    ("holds", "number", "expected"),
    [
        ("policy@2", 2, ["lend", "release"]),
        ("policy@2", 1, []),  # an earlier one is on disk
        (None, 2, []),  # memory is ahead of the disk, or nothing is loaded
        ("not open", 2, []),
    ],
)
def test_a_policy_is_lent_by_the_learner_that_holds_it(
    finished: Path, holds: str | None, number: int, expected: list[str]
) -> None:
    """finished: two iterations, so policies 0, 1 and 2."""
    happened: list[str] = []
    taken: list[object] = []
    run = ActiveRun(Path("artifacts"), load_config(Path("pipeline.yaml")), Path(), Console(quiet=True))

    run.start = {"policy": Path("model")}

    def lend(start: Path) -> str:
        assert start == run.start["policy"]
        happened.append("lend")
        return "weights"

    held = run.id_of(holds) if holds and "@" in holds else None
    learner = SimpleNamespace(holds=held, lend=lend, release=lambda: happened.append("release"))
    with Resources(run) as resources:
        if holds != "not open":
            resources._open["update"] = SimpleNamespace(learner=learner, flush=lambda: None)
        with pytest.raises(EngineError):
            fails_with(resources.lend(number), taken)
    on_disk = held_part(run, number, POLICY) if number else run.start["policy"]
    assert taken == [on_disk if not expected else "weights"]
    assert happened == expected
