"""What `auto` becomes: by the device, and by the memory that is free when the learner is opened."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.update.examples import configuration, make_rollouts, weights_of
from tests.update.runs import commit_rollouts, make_run, update

from grpo.artifacts import ActiveRun
from grpo.models.loading import load_model
from grpo.models.size import num_parameters
from grpo.update import gradient_checkpointing, stage
from grpo.update import plan as planning
from grpo.update.learner import Learner
from grpo.update.opening import checkpoints_gradients
from grpo.update.plan import plan, resolved

AUTO = {"precision": "auto", "gradient_checkpointing": "auto"}


def run_of(folder: Path, policy: Path, **given: Any) -> ActiveRun:
    run = make_run(folder, configuration(**given), policy, policy)
    commit_rollouts(run, 0, make_rollouts())
    return run


def in_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(gradient_checkpointing, "main_memory", lambda: (2**40, free))


@pytest.mark.parametrize("given", [{}, AUTO, {"precision": "float32"}, {"gradient_checkpointing": False}])
def test_a_plan_on_a_cpu_is_that_of_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: Path, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(planning, "gpu_is_there", lambda: False)
    said = run_of(tmp_path / "said", still, precision="float32", gradient_checkpointing=False)
    found = plan(run_of(tmp_path / "given", still, **given), 0)
    assert found.config["update"]["precision"] == "float32"
    assert "gradient_checkpointing" not in found.config["update"]
    assert found.fingerprint(0) == plan(said, 0).fingerprint(0)


def test_another_device_is_another_precision_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: Path
) -> None:
    monkeypatch.setattr(planning, "gpu_is_there", lambda: False)
    run = run_of(tmp_path, still)
    update(run, 0, Learner(run.config.update, "cpu"))
    made = run.manifest("update", 0)
    assert made is not None
    assert plan(run, 0).differences(made) == []
    monkeypatch.setattr(planning, "gpu_is_there", lambda: True)
    assert plan(run, 0).differences(made) == ['update.precision: "float32" -> "bfloat16"']


def test_what_is_given_is_kept() -> None:
    for given in ({"precision": "float32", "gradient_checkpointing": False}, {"precision": "bfloat16"}):
        config = configuration(**given).update
        found = resolved(config, on_gpu=True, checkpointing=True)
        assert {key: getattr(found, key) for key in given} == given
    found = resolved(configuration().update, on_gpu=True, checkpointing=True)
    assert (found.precision, found.gradient_checkpointing) == ("bfloat16", True)
    found = resolved(configuration().update, on_gpu=False)
    assert (found.precision, found.gradient_checkpointing) == ("float32", False)


def test_checkpointing_only_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, still)
    run.console.quiet = False
    in_memory(monkeypatch, 2**40)
    assert gradient_checkpointing.resolve(run).gradient_checkpointing is False
    assert capsys.readouterr().err == ""
    in_memory(monkeypatch, 2**20)
    assert gradient_checkpointing.resolve(run).gradient_checkpointing is True
    said = capsys.readouterr().err
    assert said.startswith("update.gradient_checkpointing: auto is true here: a micro-batch of ")
    assert said.endswith(" without, and 0.0 GiB are free\n")
    given = run_of(tmp_path / "given", still, gradient_checkpointing=False)
    assert gradient_checkpointing.resolve(given).gradient_checkpointing is False


def test_each_replica_holds_all_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # then all four are on this machine
    monkeypatch.setattr(gradient_checkpointing, "_GIB", 1)  # bytes are said then
    run: Any = run_of(tmp_path, still, kl_coefficient=0.0)
    run.console.quiet = False
    in_memory(monkeypatch, 0)
    needed = []
    for replicas in (1, 2):
        run.ranks = SimpleNamespace(world=4, replicas=replicas)
        assert gradient_checkpointing.resolve(run).gradient_checkpointing is True
        needed.append(float(capsys.readouterr().err.partition(" tokens needs ")[2].partition(" ")[0]))
    assert needed[1] - needed[0] == 16 * num_parameters(still)  # weights, gradients and moments once more


def test_a_model_with_dropouts_is_not_checkpointed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tied: Path
) -> None:
    in_memory(monkeypatch, 2**20)
    assert gradient_checkpointing.resolve(run_of(tmp_path, tied)).gradient_checkpointing is False


def test_an_update_records_what_it_was_and_gives_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: Path
) -> None:
    found = {}
    for name, free in (("kept", 2**40), ("again", 2**20)):
        in_memory(monkeypatch, free)
        run = run_of(tmp_path / name, still)
        with stage.open_resource(run, None) as policies:
            learner = policies.learner
            update(run, 0, learner)
            found[name] = {key: weight.clone() for key, weight in weights_of(learner).items()}
            assert checkpoints_gradients(learner.model) == (name == "again")
        made = run.manifest("update", 0)
        assert made is not None
        assert made.execution["gradient_checkpointing"] is (name == "again")
        assert made.config["update"]["precision"] == "float32"
    assert all(torch.equal(weight, found["again"][key]) for key, weight in found["kept"].items())


def test_nothing_runs_at_tf32(monkeypatch: pytest.MonkeyPatch, still: Path) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")  # as whoever shares the process may have asked for
        torch.backends.cudnn.allow_tf32 = True
        load_model(still, "cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
