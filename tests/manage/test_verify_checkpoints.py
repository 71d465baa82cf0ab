"""What `grpo verify` says of policies on disk, and that a damaged one is rebuilt from the tables."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Grpo, Once, copy_to_work_in, run_within
from tests.manage.test_verify import RUN, flip, verify

from grpo.artifacts.manifest import digest


def test_which_policies_are_on_disk_and_what_the_newest_is_rebuilt_from(project: Path, grpo: Grpo) -> None:
    few = ["--set", "checkpoints={every: 2, keep_last: null}", "--set", "iterations=5"]
    assert grpo("run", *few)[0] == 0
    shutil.rmtree(RUN / "iteration=000004/checkpoint")  # of the last one, which a command always writes
    found = verify(grpo)[1]["policies"]
    seconds = sum(json.loads((RUN / "iteration=000004/update/timings.json").read_text())["seconds"].values())
    assert found == {
        "on_disk": [0, 2, 4],
        "newest": 5,
        "updates": 1,
        "seconds": seconds,
        "gone": "",
        "rebuilt": [],
    }
    assert json.loads(grpo("status", "--json")[1])["policies"] == found
    line = "policies on disk 0, 2, 4; policy 5 is 1 update from 4 (about "
    assert line in grpo("verify")[1]
    assert line in grpo("status")[1]
    assert grpo("advantage", "--iteration", "4", "--force", "--set", "advantage.scale=none")[0] == 0
    assert verify(grpo)[1]["policies"]["on_disk"] == [0, 2, 4, 5]  # written before what it came from goes
    shutil.rmtree(RUN / "iteration=000004/checkpoint")
    found = json.loads(grpo("status", "--json")[1])["policies"]
    gone = "update 4 was made from another advantages@4 than the one that is there"
    assert (found["on_disk"], gone in found["gone"]) == ([0, 2, 4], True)
    assert gone in grpo("status")[1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


CHECKPOINT = RUN / "iteration=000004/checkpoint"
WEIGHTS, MOMENTS = "policy/model.safetensors", "optimizer/optimizer.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of the weights": (WEIGHTS, flip),
    "cut weights": (WEIGHTS, cut),
    "no weights": (WEIGHTS, Path.unlink),
    "a bit of the optimiser state": (MOMENTS, flip),
    "no optimiser state": ("optimizer", shutil.rmtree),
    "a bit of the manifest": ("manifest.json", flip),
    "no JSON": ("manifest.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_rebuilt(
    few: Path, grpo: Grpo, name: str, damage: Callable[[Path], object]
) -> None:
    """Its policy follows from the tables, so that the run goes on as if it had never been written."""
    damage(CHECKPOINT / name)
    code, found = verify(grpo)
    [told] = found["damaged"]
    assert (code, told["redo"]) == (6, "grpo run")
    assert told["found"].startswith(str(CHECKPOINT))
    assert told["found"].endswith("; without it policy 5 is rebuilt when it is needed")
    code, _, err = grpo("run", *FEW, "--set", "iterations=6")
    assert (code, err.splitlines()[-1].startswith(f"error: {CHECKPOINT}")) == (6, True), err
    assert verify(grpo, "--discard")[0] == 6
    assert not CHECKPOINT.exists()
    assert verify(grpo)[0] == 0
    code, _, err = grpo("run", *FEW, "--set", "iterations=6")
    assert (code, "policy 5 is not on disk: rebuilding it from policy 3 (2 updates, about" in err) == (
        0,
        True,
    )
    assert verify(grpo)[0] == 0
    assert (RUN / "iteration=000005/checkpoint" / WEIGHTS).read_bytes() == (few / WEIGHTS).read_bytes()


def test_a_checkpoint_without_its_manifest_is_none(few: Path, grpo: Grpo) -> None:
    (CHECKPOINT / "manifest.json").unlink()
    assert verify(grpo)[1]["policies"]["on_disk"] == [0, 3]
    assert grpo("run", *FEW, "--set", "iterations=6")[0] == 0
    assert (RUN / "iteration=000005/checkpoint" / WEIGHTS).read_bytes() == (few / WEIGHTS).read_bytes()
    assert verify(grpo)[1]["policies"]["on_disk"] == [0, 3, 6]


@pytest.mark.parametrize(("command", "code"), [(["update", "--iteration", "5"], 6), (["run"], 8)])
def test_weights_that_are_not_those_of_their_update_are_not_taken(
    few_once: Path, few: Path, grpo: Grpo, command: list[str], code: int
) -> None:
    """A whole checkpoint with all its files' digests, and of another policy: only its weights can tell.

    Before anything is sampled, the engine does, by what the update recorded of the weights.
    """
    if command[0] == "update":
        shutil.rmtree("artifacts")
        shutil.copytree(few_once / "six", "artifacts")
        for output in ("update", "checkpoint"):
            shutil.rmtree(RUN / "iteration=000005" / output)
    shutil.copyfile(RUN / "iteration=000002/checkpoint" / WEIGHTS, CHECKPOINT / WEIGHTS)
    path = CHECKPOINT / "manifest.json"
    manifest = json.loads(path.read_text())
    for record in manifest["files"]:
        if record["name"] == "model.safetensors":
            record["sha256"] = hashlib.sha256((CHECKPOINT / WEIGHTS).read_bytes()).hexdigest()
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    assert verify(grpo)[0] == 0
    found, _, err = grpo(*command, *FEW, "--set", "iterations=6")
    line = {
        6: f"error: {CHECKPOINT}: its weights are not those that its manifest says",
        8: "error: generate: the engine does not compute the policy as the learner does: ",
    }[code]
    assert (found, err.splitlines()[-1][: len(line)]) == (code, line), err


@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json"])
def test_a_damaged_checkpoint_of_a_policy_that_is_gone_stays(few: Path, grpo: Grpo, name: str) -> None:
    force = ["--iteration", "4", "--force", "--set", "advantage.scale=none"]
    assert grpo("advantage", *force)[0] == 0
    flip(CHECKPOINT / name)
    code, found = verify(grpo, "--discard")
    [told] = found["damaged"]
    assert (code, told["redo"], CHECKPOINT.exists()) == (6, None, True)
    assert (
        "cannot be rebuilt (policy 5 is not on disk, and cannot be rebuilt: update 4 was made"
        in told["found"]
    )
    assert told["found"].endswith("restore it from a copy, or `grpo run --from 4`")


FEW = ["--set", "checkpoints={every: 3, keep_last: 9}"]


@pytest.fixture(scope="session")
def few_once(write_project: Callable[[Path], Path], once: Once) -> Path:
    """Two projects, of five iterations and of six, with the policies 0, 3 and the last on disk; read only."""

    def build(folder: Path) -> None:
        write_project(folder)
        run_within(folder, "run", *FEW, "--set", "iterations=5")
        shutil.copytree(folder / "artifacts", folder / "five")
        run_within(folder, "run", *FEW, "--set", "iterations=6")
        (folder / "artifacts").rename(folder / "six")
        (folder / "five").rename(folder / "artifacts")

    return once("few", build)


@pytest.fixture
def few(few_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in the project of five iterations; the checkpoint of policy 6 as it would become."""
    copy_to_work_in(few_once, tmp_path, monkeypatch)
    return few_once / "six/tiny/iteration=000005/checkpoint"
