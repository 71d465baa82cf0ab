"""Four processes in two replicas (gloo) against four that share one out, and against one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.families import write_checkpoint
from tests.update import groups
from tests.update.test_parallel import (
    Case,
    deviation,
    gradients,
    load,
    make_rollouts,
    opened,
    ruin,
    save,
    shares,
    take_step,
)
from transformers import Qwen2ForCausalLM

from grpo.artifacts import OPTIMIZER
from grpo.errors import EngineError, UsageError
from grpo.update.collective import collective
from grpo.update.execution import execution_of
from grpo.update.launch import REPLICAS, _replicas
from grpo.update.learner import Learner
from grpo.update.parallel import Ranks
from grpo.update.sharding import part_of

pytestmark = pytest.mark.xdist_group("parallel")
WORLD = 4
WEIGHT = "model.layers.0.mlp.down_proj.weight"
CASES = {
    "dapo": Case("dapo"),  # 3 groups: of four processes one has nothing to read
    "qwen3_moe": Case("dapo", policy="qwen3_moe"),
    "lora": Case(update={"lora": {"rank": 4, "alpha": 8}}),
}


@collective
def rows(learner: Learner) -> list[tuple[int, int]]:
    """Of a weight, which each process has."""
    assert learner.ranks is not None
    own = part_of(learner.model.get_parameter(WEIGHT))[0]
    return learner.ranks.to_all((own.start, own.stop))


@collective
def failed(learner: Learner) -> list[str]:
    """What each process last raised with the others."""
    assert learner.ranks is not None
    return learner.ranks.to_all(str(learner.ranks.failure))


def steps(folder: Path, name: str, ranks: Ranks | None) -> dict[str, Any]:
    case, place = CASES[name], folder / f"{name}-{0 if ranks is None else ranks.replicas}"
    learner, rollouts = opened(folder, case, ranks), make_rollouts(case.lengths)
    found: dict[str, Any] = {"start": learner.digest(), "shares": shares(learner)}
    if ranks is not None and name == "dapo":
        found["rows"] = rows(learner)
    found["row"], found["logprobs"] = take_step(learner, rollouts)
    found["gradients"] = {key: value.clone() for key, value in gradients(learner).items()}
    found["execution"] = execution_of(learner)
    save(learner, folder / case.policy, place)
    found["row 1"], _ = take_step(learner, rollouts)
    found["end"] = learner.digest()
    again = opened(folder, case, ranks)
    load(again, folder / case.policy, place)
    found["resumed row"], _ = take_step(again, rollouts)
    found["resumed"] = again.digest()
    if ranks is not None:
        load(again, folder / case.policy, folder / f"{name}-0")
        save(again, folder / case.policy, place.with_name(f"{place.name}-copied"))
    return found


def driver(folder: Path, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {name: steps(folder, name, ranks) for name in CASES}
    learner, rollouts = opened(folder, CASES["dapo"], ranks), make_rollouts(CASES["dapo"].lengths)
    ruin(learner, int(rollouts.responses[5][0]))
    with pytest.raises(EngineError) as error:
        take_step(learner, rollouts)
    found["failure"], found["exit code"] = str(error.value), error.value.exit_code
    found["failed"] = failed(learner)
    found["after"] = take_step(opened(folder, CASES["dapo"], ranks), rollouts)[0]["loss"]
    return found


def as_process(rank: int, folder: Path, scene: str) -> None:
    torch.set_num_threads(1)
    replicas = int(scene)
    ranks = Ranks(groups.store(folder, f"meeting {scene}", WORLD), rank, WORLD, replicas=replicas)
    if rank == 0:
        torch.save(driver(folder, ranks), folder / f"{scene}.pt")
        ranks.end(0, "")
    else:
        ranks.follow()
    ranks.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    for name, seed in (("policy", 0), ("reference", 2)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            Qwen2ForCausalLM(tiny.qwen2(initializer_range=0.1)).save_pretrained(folder / name)
    write_checkpoint(folder / "qwen3_moe", "qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, Any]:
    """Of one process (0), and of four in so many replicas."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {name: steps(folder, name, None) for name in CASES}
    torch.set_num_threads(threads)
    for replicas in (1, 2):
        assert groups.start(as_process, folder, [str(replicas)], WORLD) == [0] * WORLD
    return {0: one} | {n: torch.load(folder / f"{n}.pt", weights_only=False) for n in (1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_added_up_once_over_all_processes(results: Any, case: str) -> None:
    one, shared, replicated = (results[n][case] for n in (0, 1, 2))
    assert replicated["start"] == shared["start"] == one["start"]
    for other in (one, shared):
        assert deviation(replicated["gradients"], other["gradients"]) <= 1e-5
        assert replicated["row"].keys() == other["row"].keys()
        for name, value in other["row"].items():
            close = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)
            assert replicated["row"][name] == close, name  # grad_norm among them, before clipping


@pytest.mark.parametrize("case", CASES)
def test_a_step_after_a_checkpoint_is_the_step_without_it(results: Any, case: str) -> None:
    found = results[2][case]
    assert found["resumed row"] == found["row 1"]
    assert found["resumed"] == found["end"] != found["start"]


@pytest.mark.parametrize("case", CASES)
def test_files_do_not_know_of_replicas(folder: Path, results: Any, case: str) -> None:
    assert results
    one, two = (
        {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (folder / f"{case}-0", folder / f"{case}-2-copied")
    )
    assert len([name for name in one if name.startswith(OPTIMIZER)]) > 1
    assert two == one


def test_each_replica_is_shared_out_among_its_own(results: Any) -> None:
    # Of 32 rows each of four processes has 8; of two in a replica 16, and two have the same.
    assert results[1]["dapo"]["rows"] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert results[2]["dapo"]["rows"] == [(0, 16), (16, 32), (0, 16), (16, 32)]
    held = results[2]["dapo"]["shares"]["policy"]
    assert sum(held) == pytest.approx(2.0)
    assert max(held) < 0.52


def test_how_it_was_computed_is_recorded(results: Any) -> None:
    for replicas, world in ((0, 1), (1, 4), (2, 4)):
        execution = results[replicas]["dapo"]["execution"]
        assert (execution["processes"], execution["replicas"]) == (world, max(replicas, 1))


def test_what_one_process_finds_wrong_all_raise(results: Any) -> None:
    shared, replicated = results[1], results[2]
    assert replicated["failure"] == shared["failure"]
    assert replicated["exit code"] == 8
    assert replicated["failed"] == [replicated["failure"]] * WORLD
    assert "policy_logprobs are not finite on rollouts" in replicated["failure"]
    assert replicated["after"] == pytest.approx(shared["after"], rel=1e-5)


def test_torchrun_has_them_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _replicas(4) == 1
    monkeypatch.setenv(REPLICAS, "2")
    assert _replicas(4) == 2
    for wrong in ("3", "0", "two", "-1", ""):
        monkeypatch.setenv(REPLICAS, wrong)
        with pytest.raises(UsageError, match=f"GRPO_REPLICAS: found {wrong}; right is what divides the 4"):
            _replicas(4)
