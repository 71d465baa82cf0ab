"""`grpo verify --replay`: every update made again from its tables gives the bits that it left."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.conftest import Grpo
from torch import distributed

from grpo import tables
from grpo.artifacts import seal
from grpo.artifacts.files import sha256_of
from grpo.update.execution import weights_digest

RUN = Path("artifacts/tiny")
SURROGATE = """
import torch
def surrogate(logprobs, old_logprobs, advantages):
    return torch.exp(logprobs - old_logprobs) * advantages
"""
SETTINGS = {
    "full weights": [],
    "several steps": [
        "update.epochs=2",
        "update.steps_per_iteration=2",
        "update.schedule=cosine",
        "iterations=9",
    ],
    "older rollouts": ["update.replay_iterations=2", "update.objective=dr_grpo"],
    "recomputed": ["update.old_logprobs=recomputed", "update.epochs=2", "update.top_entropy=0.5"],
    "entropy": ["update.entropy_target=3.0", "update.entropy_coefficient=0.01"],
    "adapter": ["update.lora={rank: 2, alpha: 4}"],
    "moved reference": ["update.reference_every=2", "update.kl_coefficient=0.1"],
    "adapter, moved reference": ["update.lora={rank: 2, alpha: 4}", "update.reference_every=2"],
    "bfloat16": ["update.precision=bfloat16", "update.gradient_checkpointing=true"],
    "bfloat16, moved reference": ["update.precision=bfloat16", "update.reference_every=2"],
    "float32 master": [
        *("update.precision=bfloat16", "update.weights=bfloat16_master", "update.reference_every=2"),
        *("update.kl_coefficient=0.1", "update.gradient_checkpointing=true"),
        "update.max_tokens_per_batch=64",
    ],
}


def run(grpo: Grpo, *settings: str, until: int = 4) -> None:
    arguments = [part for setting in settings for part in ("--set", setting)]
    code, _, err = grpo("run", "--until", str(until), *arguments)
    assert code == 0, err


def replay(grpo: Grpo) -> tuple[int, dict[str, Any]]:
    code, out, err = grpo("verify", "--replay", "--json")
    assert out, err
    return code, json.loads(out)["replay"]


def manifest(output: str, iteration: int, root: Path = RUN) -> tuple[Path, dict[str, Any]]:
    path = root / f"iteration={iteration:06d}" / output / "manifest.json"
    return path, json.loads(path.read_text())


def edit(path: Path, held: dict[str, Any]) -> None:
    path.write_bytes(seal({key: value for key, value in held.items() if key != "sha256"}))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_update_gives_its_bits_again(project: Path, grpo: Grpo, settings: list[str]) -> None:
    run(grpo, "checkpoints.keep_last=2", "checkpoints.keep_every=null", *settings)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    code, found = replay(grpo)
    assert (code, found) == (
        0,
        {"updates": 4, "replayed": 4, "equal": 4, "first_refused": None, "stopped": None},
    )
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_each_update_is_made_as_its_manifest_says(project: Path, grpo: Grpo) -> None:
    """Whatever pipeline.yaml says now, and however many threads there are."""
    run(grpo, "update.max_tokens_per_batch=64", until=2)
    run(grpo, "update.learning_rate=0.02", "update.betas=[0.5, 0.9]", "update.kl_coefficient=0", until=4)
    torch.set_num_threads(2)
    try:
        run(grpo, "update.weight_decay=0.1", "update.prompt_sharing=off", "iterations=50", until=5)
    finally:
        torch.set_num_threads(1)
    assert [manifest("update", i)[1]["execution"]["threads"] for i in range(5)] == [1, 1, 1, 1, 2]
    assert replay(grpo)[1]["equal"] == 5
    code, out, _ = grpo("verify", "--replay")
    assert (code, out.splitlines()[-1]) == (0, "replayed 5 of 5 updates from policy 0: 5 byte-equal")


def test_the_weights_computed_with_may_change_in_the_middle(project: Path, grpo: Grpo) -> None:
    """And a run that was left and gone on with has the bits of one that was not."""
    precise = ("update.kl_coefficient=0.1",)
    master = (*precise, "update.precision=bfloat16", "update.weights=bfloat16_master")
    run(grpo, *precise, until=1)
    run(grpo, *master, until=3)
    run(grpo, *precise, "update.precision=bfloat16", until=4)
    run(grpo, *master, until=5)
    assert replay(grpo)[1]["equal"] == 5
    run(grpo, *master, "run=once", until=3)
    for until in (1, 2, 3):
        run(grpo, *master, "run=thrice", until=until)
    digests = [
        manifest("update", 2, Path("artifacts", name))[1]["summary"]["weights"] for name in ("once", "thrice")
    ]
    assert digests[0] == digests[1]


def test_the_users_surrogate_is_the_one_that_was_kept(project: Path, grpo: Grpo) -> None:
    Path("loss.py").write_text(SURROGATE)
    own = ("update.surrogate=loss:surrogate", "update.clip_low=null", "update.clip_high=null")
    run(grpo, *own, until=2)
    Path("loss.py").write_text(SURROGATE.replace("* advantages", "* advantages * 2"))
    run(grpo, *own, until=3)
    Path("loss.py").unlink()
    assert replay(grpo)[1]["equal"] == 3
    for kept in (RUN / "sources").glob("*-loss.py"):
        kept.unlink()
    code, found = replay(grpo)
    why = "update.surrogate: update 0: the run has no copy of it; it cannot be replayed"
    assert (code, found["replayed"], found["stopped"]) == (4, 0, why)


def test_one_bit_of_one_advantage_is_found(finished: Path, grpo: Grpo) -> None:
    """Forged with all digests on the way, so that nothing else can see it."""
    path, held = manifest("advantages", 1)
    [record] = held["files"]
    file = path.parent / record["name"]
    table = pq.read_table(file)
    values = table["advantage"].to_pylist()
    at = next(i for i, value in enumerate(values) if value and table["keep"][i].as_py())
    values[at] = (
        float.fromhex(values[at].hex().replace("0x1.", "0x1.8", 1)) if values[at] == 0 else -values[at]
    )
    column = table.schema.get_field_index("advantage")
    forged = table.set_column(column, table.schema.field(column), pa.array(values, table["advantage"].type))
    file.write_bytes(tables.encode(forged))
    record |= {"sha256": sha256_of(file), "bytes": file.stat().st_size}
    edit(path, held)
    code, found = replay(grpo)
    assert code == 8
    assert (found["replayed"], found["equal"], found["first_refused"]["iteration"]) == (2, 1, 1)
    assert "weights" in found["first_refused"]["differing"]
    code, out, _ = grpo("verify", "--replay")
    assert code == 8
    assert "\ndiffers  update 1: weights" in out


def test_what_of_the_execution_is_another_is_said(finished: Path, grpo: Grpo) -> None:
    path, held = manifest("update", 0)
    held["summary"]["weights"] = "0" * 64
    held["execution"]["torch"] = "1.0"
    edit(path, held)
    code, out, _ = grpo("verify", "--replay")
    assert code == 8
    assert f'its execution here: torch: "1.0" -> "{torch.__version__}"' in out
    # Where the same bits are not promised, the same numbers are enough.
    held["execution"]["determinism"] = "checked"
    edit(path, held)
    code, found = replay(grpo)
    assert (code, found["replayed"] - found["equal"]) == (0, 1)


def test_an_update_that_cannot_be_made_again(finished: Path, grpo: Grpo) -> None:
    path, held = manifest("update", 1)
    original = path.read_bytes()
    del held["execution"]
    edit(path, held)
    code, found = replay(grpo)
    assert (code, found["replayed"], found["equal"]) == (4, 1, 1)
    assert found["stopped"].startswith("update 1 has no record of its execution (an older grpo made it)")
    path.write_bytes(original)
    assert grpo("advantage", "--iteration", "1", "--force", "--set", "advantage.scale=none")[0] == 0
    code, out, _ = grpo("verify", "--replay")
    assert code == 4
    why = "update 1 was made from another advantages@1 than the one that is there: it cannot be replayed"
    assert f"stopped  {why}\n" in out
    assert out.endswith("replayed 1 of 2 updates from policy 0: 1 byte-equal\n")


@pytest.mark.parametrize("threads", [0, 10**9, "many"])
def test_a_hostile_number_of_threads(finished: Path, grpo: Grpo, threads: object) -> None:
    path, held = manifest("update", 1)
    held["execution"]["threads"] = threads
    edit(path, held)
    assert grpo("verify", "--replay")[0] == 6


def test_every_change_of_the_weights_changes_their_digest() -> None:
    model = torch.nn.Linear(300, 100)  # more than a block of the digest, and a rest
    weight, bits = model.weight.data, model.weight.data.view(torch.int32)
    digest = weights_digest(model)

    def changed() -> bool:
        return weights_digest(model) != digest

    bits[3, 7] ^= 1
    assert changed()
    bits[3, 7] ^= 1
    assert not changed()
    bits[99, 299] ^= 1  # in the rest
    assert changed()
    bits[99, 299] ^= 1
    bits[1, 0] += 1  # up by one here and down there
    bits[2, 0] -= 1
    assert changed()
    bits[1, 0] -= 1
    bits[2, 0] += 1
    weight[5, 6], weight[5, 7] = weight[5, 7].clone(), weight[5, 6].clone()
    assert changed()
    weight[5, 6], weight[5, 7] = weight[5, 7].clone(), weight[5, 6].clone()
    assert not changed()
    model.bias.data = model.bias.data.half()
    assert changed()


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """As vLLM makes it in a process that it samples in."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_process_group_of_one_changes_nothing(finished: Path, grpo: Grpo, group_of_one: None) -> None:
    found = replay(grpo)[1]
    assert found["updates"] == found["equal"] > 0


def test_a_damaged_run_is_not_replayed_and_says_why(finished: Path, grpo: Grpo) -> None:
    path = next(Path("artifacts/tiny/iteration=000001/rollouts").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = grpo("verify", "--replay", "--json")
    assert (code, err) == (6, "")
    nothing = {"updates": None, "replayed": 0, "equal": 0, "first_refused": None}
    assert json.loads(out)["replay"] == {**nothing, "stopped": "something is damaged"}
    assert json.loads(out)["exit"] == 6
    assert grpo("verify", "--replay")[1].endswith("not replayed: something is damaged\n")
