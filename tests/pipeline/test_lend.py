"""Policies that an engine takes from the learner's memory, against the same from disk: the same bytes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests.conftest import Grpo

from grpo.artifacts import CHECKPOINT
from grpo.generate.engines.transformers_engine import TransformersEngine
from grpo.models.weights import Weights
from grpo.pipeline.resources import Resources
from grpo.pipeline.stages import UPDATE
from grpo.update.checkpoint import policy_files

ITERATIONS = "iterations=3"
LORA = "update.lora={rank: 4, alpha: 8}"
WHOLE = "update.lora={rank: 4, alpha: 8, modules_to_save: [norm]}"


@contextmanager
def from_disk(resources: Resources, number: int) -> Iterator[Path]:
    policies = resources.borrow(UPDATE.name, beside=True)
    if number == 0:
        yield resources._run.start["policy"]
        return
    policies.hold(number)
    with TemporaryDirectory() as name:
        for file, chunks in policy_files(policies.learner.model, resources._run.start["policy"]):
            Path(name, file).write_bytes(b"".join(chunks))
        yield Path(name)


def digests(run: Path) -> dict[str, dict[str, str]]:
    """What each stage of each iteration made, by its place; not which policies are on disk."""
    paths = [
        path for path in sorted(run.glob("iteration=*/*/manifest.json")) if path.parent.name != CHECKPOINT
    ]
    return {str(path.relative_to(run)): json.loads(path.read_bytes())["ids"] for path in paths}


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each policy that the built-in engine takes in memory, whether an adapter is in it."""
    found: list[bool] = []
    take = TransformersEngine.take

    def noted(engine: TransformersEngine, weights: Weights) -> None:
        found.append(weights.plain is None)
        take(engine, weights)

    monkeypatch.setattr(TransformersEngine, "take", noted)
    return found


@pytest.mark.parametrize(
    ("changes", "has_adapter"),
    [
        ([], False),
        (["update.gradient_checkpointing=true"], False),
        (["update.kl_coefficient=0.1", "update.epochs=2"], False),
        ([LORA], True),
        ([WHOLE, "update.gradient_checkpointing=true"], True),
    ],
)
def test_what_is_sampled_from_memory_is_what_is_sampled_from_disk(
    write_measured_project: Callable[[Path], Path],
    tmp_path: Path,
    grpo: Grpo,
    monkeypatch: pytest.MonkeyPatch,
    lent: list[bool],
    changes: list[str],
    has_adapter: bool,
) -> None:
    monkeypatch.chdir(write_measured_project(tmp_path / "project"))
    wanted = [part for each in (ITERATIONS, "evaluate.every=3", *changes) for part in ("--set", each)]
    code, _, err = grpo("run", *wanted)
    assert code == 0, err
    # Opening takes the start and its perturbed copy; policies 1, 2 and, measured, 3 are the learner's.
    assert lent == [False, False, has_adapter, has_adapter, has_adapter]
    in_memory = digests(Path("artifacts/tiny"))
    Path("artifacts/tiny").rename("artifacts/in_memory")
    monkeypatch.setattr(Resources, "lend", from_disk)
    code, _, err = grpo("run", *wanted)
    assert code == 0, err
    assert len(lent) == 5 + 2  # opening alone
    assert digests(Path("artifacts/tiny")) == in_memory
    assert len(in_memory) == 3 * 4 + 2
