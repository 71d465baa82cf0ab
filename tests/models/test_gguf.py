"""A GGUF where a checkpoint is needed: whatever opens one refuses it in the same words."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo.artifacts import checkpoint_files, checkpoint_id
from grpo.errors import InputError
from grpo.models.loading import load_config, load_model, load_tokenizer
from grpo.score.reward_model import RewardModel

OPENS: list[Callable[[Path], object]] = [
    checkpoint_files,
    checkpoint_id,
    load_config,
    load_tokenizer,
    lambda path: load_model(path, "cpu"),
    lambda path: RewardModel(path, "cpu"),
]
WAY = "take the checkpoint that it was made from, or convert it as examples/capitals/model.py does"


@pytest.mark.parametrize("name", ["m/small.Q4_1.gguf", "m/SMALL.GGUF"])
@pytest.mark.parametrize("of_folder", [True, False])
@pytest.mark.parametrize("opens", OPENS)
def test_it_is_said_what_it_is(
    tmp_path: Path, opens: Callable[[Path], object], of_folder: bool, name: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir()
    file.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(InputError) as caught:
        opens(file.parent if of_folder else file)
    where = "reward model " if str(caught.value).startswith("reward model") else ""
    assert str(caught.value) == f"{where}{file}: GGUF is not read; {WAY}"


def test_beside_weights_it_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    (folder / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert checkpoint_id(folder) == checkpoint_id(tiny_model)
    load_model(folder, "cpu")
