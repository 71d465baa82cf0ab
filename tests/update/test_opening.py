"""Models that two and three processes read a part of each: together they have what load_model() gives."""

import os
import platform
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import write_checkpoint
from tests.update import groups
from tests.update.test_parallel import make_rollouts, save, settings, take_step
from torch import Tensor

from grpo.artifacts import ADAPTER, OPTIMIZER
from grpo.errors import CorruptError, ResourceError
from grpo.execute import checkpoint
from grpo.models.families import FAMILIES
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.update.collective import collective
from grpo.update.learner import Learner
from grpo.update.parallel import Ranks
from grpo.update.sharding import local

pytestmark = pytest.mark.xdist_group("parallel")
WORLDS = (2, 3)
NEVER = "6 never"
BROKEN, OTHER = "broken", "other"  # checkpoints; NaN in rows of the last rank alone; a form of its own
# Matrices the other way round; experts that are stored apart; a trunk that does not read trees.
LATER = ("gemma2", "gpt2", "qwen3_moe", "nemotron")
LORA = {"lora": {"rank": 4, "alpha": 8}}


def opened(checkpoint: Path, ranks: Ranks | None, **update: Any) -> Learner:
    learner = Learner(settings("dapo", **update), "cpu", ranks=ranks)
    learner.load(checkpoint, None, "start")
    return learner


@collective
def most(learner: Learner) -> float:
    """The largest part of all weights that a process has."""
    tensors = [*learner.model.parameters()]
    held = sum(tensor.numel() for tensor in map(local, tensors)) / sum(t.numel() for t in tensors)
    assert learner.ranks is not None
    return max(learner.ranks.to_all(held))


def seen(learner: Learner) -> dict[str, Any]:
    """What is in memory of a model, whole, and how it is read."""
    model = learner.whole()[0]
    return {
        "tensors": {name: t.detach().clone() for name, t in named(model).items()},
        "form": learner.network.reader.form,
        "attention": [each.config._attn_implementation for each in (model, learner.model)],
    }


def named(model: Any) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def driver(folder: Path, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in FAMILIES:
        learner = opened(folder / family, ranks)
        found[family] = seen(learner) | {"most": most(learner)}
        if family in LATER:
            learner.load(folder / f"{family} later", None, "later")
            found[f"{family} later"] = seen(learner)
    found["notes"] = [*ranks.notes]
    found[OTHER] = seen(opened(folder / OTHER, ranks))
    found["notes of other"] = ranks.notes[len(found["notes"]) :]
    for name in (BROKEN, f"{BROKEN} moe"):
        with pytest.raises(CorruptError) as error:
            opened(folder / name, ranks)
        found[name] = str(error.value)
    found["lora"] = opened(folder / "qwen3_moe", ranks, **LORA).digest()
    found["lora again"] = opened(folder / "qwen3_moe", ranks, **LORA).digest()
    return found


def as_process(rank: int, folder: Path, scene: str) -> None:
    world = int(scene)
    (folder / scene).mkdir(exist_ok=True)
    groups.lead(rank, folder / scene, partial(driver_of, folder), world)


def driver_of(folder: Path, ranks: Ranks) -> dict[str, Any]:
    return driver(folder, ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    for family in FAMILIES:
        write_checkpoint(folder / family, family)
    for family in LATER:
        later = write_checkpoint(folder / f"{family} later", family) / "model.safetensors"
        save_file({name: -w for name, w in load_file(later).items()}, later, metadata={"format": "pt"})
    for name, family in ((BROKEN, "qwen3"), (f"{BROKEN} moe", "qwen3_moe"), (OTHER, "qwen3")):
        weights = write_checkpoint(folder / name, family) / "model.safetensors"
        tensors = load_file(weights)
        if name == OTHER:
            tensors = {key.removeprefix("model."): weight for key, weight in tensors.items()}
        else:
            tensors[next(key for key in tensors if key.endswith("down_proj.weight"))][-1] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def several(request: pytest.FixtureRequest, folder: Path) -> tuple[int, dict[str, Any]]:
    world = request.param
    assert groups.start(as_process, folder, [str(world)], world) == [0] * world
    return world, torch.load(folder / str(world) / "0.pt", weights_only=False)


def test_together_they_have_every_bit_of_every_family(several: Any, folder: Path) -> None:
    world, found = several
    for name in (*FAMILIES, *(f"{family} later" for family in LATER)):
        right, there = load_model(folder / name, "cpu"), found[name]
        expected = named(right)
        assert there["tensors"].keys() == expected.keys(), name
        for key, tensor in expected.items():
            assert torch.equal(there["tensors"][key], tensor), (name, key)
        assert there["attention"] == [right.config._attn_implementation] * 2, name
        if name in FAMILIES:
            assert there["form"] == Reader(right).form, name
            # Of 4 experts three processes have 2, 2 and none.
            assert 1 / world <= there["most"] <= 1 / 2 + 0.02, name
    assert found["notes"] == []


def test_files_in_another_form_are_read_whole_and_it_is_said(several: Any, folder: Path) -> None:
    _, found = several
    for key, tensor in named(load_model(folder / OTHER, "cpu")).items():
        assert torch.equal(found[OTHER]["tensors"][key], tensor), key
    said = f"{folder / OTHER}: not as transformers writes it: each process holds all of it while it loads"
    assert found["notes of other"] == [said]


def test_what_one_process_finds_wrong_in_its_part_all_raise(several: Any, folder: Path) -> None:
    _, found = several
    for name in (BROKEN, f"{BROKEN} moe"):
        with pytest.raises(CorruptError) as right:
            load_model(folder / name, "cpu")
        assert found[name] == str(right.value)


def test_an_adapter_begins_as_in_one_process(several: Any, folder: Path) -> None:
    _, found = several
    assert found["lora"] == found["lora again"] == opened(folder / "qwen3_moe", None, **LORA).digest()


# A store on which a process sees late what another one has written


class Late:
    """What rank 1 sees of the folder of rank 0: half a file more each time that it has waited."""

    def __init__(self, there: Path, here: Path) -> None:
        self._there, self._here, self._now = there, here, 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        for path in sorted(self._there.rglob("*.*")):
            mine, content = self._here / path.relative_to(self._there), path.read_bytes()
            if path.parent.name != NEVER and (not mine.exists() or mine.stat().st_size < len(content)):
                mine.parent.mkdir(exist_ok=True)
                mine.write_bytes(content if mine.exists() else content[: len(content) // 2])
                return
        self._now += checkpoint.SEEN_S + 1


def read_late(ranks: Ranks) -> tuple[str, str]:
    learner = Learner(settings("dapo", **LORA), "cpu", ranks=ranks)
    learner.load(Path("1 policy"), Path("3 optimizer"), "saved", Path("2 adapter"))
    learner.load_reference(Path("4 reference"), "first")
    learner.load_reference(Path("5 later"), "later")
    with pytest.raises(ResourceError) as error:
        learner.load_reference(Path(NEVER), "never")
    return learner.digest(), str(error.value)


def as_late(rank: int, folder: Path) -> None:
    here = folder / str(rank)
    os.chdir(here)
    if rank == 1:
        vars(checkpoint)["time"] = Late(folder / "0", here)
    groups.lead(rank, folder, read_late)


def test_names_that_come_late_are_waited_for(tmp_path: Path) -> None:
    there, start = tmp_path / "0", tmp_path / "0" / "1 policy"
    (tmp_path / "1").mkdir()
    for name in ("1 policy", "4 reference", "5 later", NEVER):
        write_checkpoint(there / name, "qwen3")
    learner = opened(start, None, **LORA)
    take_step(learner, make_rollouts(((3, 9), (5, 2))))
    save(learner, start, there)
    (there / ADAPTER).rename(there / "2 adapter")
    (there / OPTIMIZER).rename(there / "3 optimizer")
    assert groups.start(as_late, tmp_path) == [0, 0]
    digest, said = torch.load(tmp_path / "0.pt", weights_only=False)
    assert digest == learner.digest()
    seen = f"execution: {platform.node()} does not see {NEVER}/"
    assert (said[: len(seen)], " as it was written; " in said) == (seen, True)
