"""A policy that is written beside other work: when, which weights, and what a failure costs."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.update.examples import all_logprobs, as_old, configuration, in_double, make_rollouts
from tests.update.runs import commit_rollouts, make_run

from grpo.artifacts import POLICY, ActiveRun, Staging, durable_policies, held_part, is_durable
from grpo.errors import ResourceError
from grpo.pipeline.stages import UPDATE, make
from grpo.update import durable, stage
from grpo.update.learner import Learner
from grpo.update.plan import plan
from grpo.update.policies import Policies

NAME = "model.embed_tokens.weight"


def run_of(tmp_path: Path, start: Path, **checkpoints: Any) -> ActiveRun:
    config = configuration(learning_rate=0.01, kl_coefficient=0.0)
    given = config.checkpoints.model_copy(update=checkpoints)
    run = make_run(tmp_path, config.model_copy(update={"checkpoints": given}), start, start)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(start), rollouts), 0.1))
    for iteration in range(4):
        commit_rollouts(run, iteration, rollouts)
    return run


def update(run: ActiveRun, iteration: int, policies: Policies) -> np.ndarray:
    """One update; a weight of the policy that it made."""
    make(run, UPDATE, Staging(run, plan(run, iteration), 0), policies)
    return policies.learner.model.get_parameter(NAME).detach().numpy().copy()


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writer waits with its first file until this is set."""
    go, write = threading.Event(), Staging.write_bytes

    def waiting(self: Staging, part: str, name: str, content: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and part:
            assert go.wait(60)
        return write(self, part, name, content)

    monkeypatch.setattr(Staging, "write_bytes", waiting)
    return go


def test_what_is_written_is_of_before_the_next_step(
    tmp_path: Path, untied: Path, held_back: threading.Event
) -> None:
    run = run_of(tmp_path, untied, every=1)
    with stage.open_resource(run, None) as policies:
        first = update(run, 0, policies)  # returns though nothing is on disk
        assert not is_durable(run, 1)
        threading.Timer(0.3, held_back.set).start()
        second = update(run, 1, policies)  # waits for the writer before it loads or steps
        assert is_durable(run, 1)
    folder = held_part(run, 1, POLICY)
    assert folder is not None
    assert np.array_equal(load_file(folder / "model.safetensors")[NAME], first)
    assert not np.array_equal(first, second)
    assert durable_policies(run) == [0, 1, 2]


def test_a_failure_of_the_writer_is_raised_at_the_next_wait_and_the_update_stays(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = run_of(tmp_path, untied, every=1), Staging.write_bytes

    def full(self: Staging, part: str, name: str, content: Any) -> Any:
        if part:
            raise ResourceError("no space")
        return write(self, part, name, content)

    monkeypatch.setattr(Staging, "write_bytes", full)
    with stage.open_resource(run, None) as policies:
        update(run, 0, policies)
        with pytest.raises(ResourceError, match="no space"):
            policies.flush()
        policies.made = None  # or it would be tried once more at the end
    monkeypatch.setattr(Staging, "write_bytes", write)
    assert run.manifest("update", 0) is not None
    assert durable_policies(run) == [0]
    with stage.open_resource(run, None) as policies:
        update(run, 1, policies)  # policy 1 is rebuilt, and was due
    assert durable_policies(run) == [0, 1, 2]


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        ({"every": 2, "keep_last": None}, [0, 2, 4]),
        ({"every": 3, "keep_last": 1}, [0, 4]),  # the last of a command always is
        ({"every": 100, "keep_every": 3}, [0, 3, 4]),
        ({"every": "15m"}, [0, 4]),
        ({"every": "auto", "keep_last": 1}, [0, 4]),
    ],
)
def test_when_a_policy_is_written(
    tmp_path: Path, untied: Path, checkpoints: dict[str, Any], expected: list[int]
) -> None:
    run = run_of(tmp_path, untied, **checkpoints)
    with stage.open_resource(run, None) as policies:
        for iteration in range(4):
            update(run, iteration, policies)
    assert durable_policies(run) == expected


def test_auto_takes_a_share_of_the_time(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("grpo.update.durable.time.monotonic", lambda: now[0])
    run = run_of(tmp_path, untied, every="auto")
    learner = Learner(run.config.update, "cpu")
    learner.load(untied, None, run.id_of("policy@0"))
    checkpoints = durable.Checkpoints(run)
    checkpoints._seconds = 2.0  # that the last one took
    due = {at: (now.__setitem__(0, at), checkpoints._is_due(1, learner))[1] for at in (1.0, 99.0, 101.0)}
    assert due == {1.0: False, 99.0: False, 101.0: True}
    checkpoints._seconds = 1000.0
    due = {at: (now.__setitem__(0, at), checkpoints._is_due(1, learner))[1] for at in (1799.0, 1801.0)}
    assert due == {1799.0: False, 1801.0: True}  # half an hour at the latest
    checkpoints.close()
