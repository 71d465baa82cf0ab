"""Each configuration of examples/ that runs on the starter model is one, and an iteration of it works."""

import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo

from grpo.config import load
from grpo.models import starter_model

EXAMPLES = Path(__file__).parents[2] / "examples"
ON_THE_STARTER = ("distil", "gdpo", "pass_at_k")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_is_a_configuration(path: Path) -> None:
    assert load(path).run


@pytest.mark.parametrize("name", ON_THE_STARTER)
def test_an_iteration(
    name: str, tmp_path: Path, grpo: Grpo, starter_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "artifacts" / ".models"
    shutil.copytree(starter_model, models / "tiny-arithmetic")
    shutil.copytree(starter_model, models / "small-arithmetic")  # a teacher of the same tokenizer
    shutil.copy(EXAMPLES / f"{name}.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = grpo("run", "-c", f"{name}.yaml", "--until", "1", "--set", "evaluate=null")
    assert code == 0, err


def test_the_teacher_is_as_large_as_doctor_says() -> None:
    from grpo.manage.doctor import inputs

    size = starter_model.SIZES["small-arithmetic"]
    model = starter_model._untrained(starter_model.build_tokenizer(), size)
    assert sum(p.numel() for p in model.parameters()) == inputs._STARTERS["small-arithmetic"]
