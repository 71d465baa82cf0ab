"""Where the learner's tensors are between its turns: a CPU stands for both sides of the bus."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.update.examples import (
    OPTIMIZER_FILE,
    ROWS,
    all_logprobs,
    as_old,
    configuration,
    in_double,
    make_learner,
    make_rollouts,
    save_learner,
    settings,
    weights_of,
    whole_step,
)
from tests.update.runs import make_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config import UpdateConfig
from grpo.models.turns import SPARE_BYTES
from grpo.update import stage
from grpo.update.learner import Learner
from grpo.update.objective import Stored
from grpo.update.residence import Residence

CASES: dict[str, tuple[dict[str, Any], float]] = {
    # bytes a parameter that wait: weights and two moments, and a reference
    "float32": ({}, 12.0),
    "with a reference": ({"kl_coefficient": 0.1}, 16.0),
    "a copy in bfloat16 is made again": ({"precision": "bfloat16", "weights": "bfloat16_master"}, 12.0),
    "with a reference in bfloat16": (
        {"precision": "bfloat16", "weights": "bfloat16_master", "kl_coefficient": 0.1},
        14.0,
    ),
}


class Moved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that are copied between tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.num_bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


class Device:
    """Of `free` and 100 bytes in all; counts what is allocated in main memory."""

    def __init__(self, free: int) -> None:
        self.allocated: Counter[tuple[int, ...]] = Counter()
        self.free = free

    def allocate(self, like: Tensor) -> Tensor:
        self.allocated[tuple(like.shape)] += 1
        return torch.empty_like(like)


def settle(learner: Learner, device: Device) -> None:
    """From now on as on a GPU with so much memory."""
    learner.device = "another"
    share = 0.5  # 50 bytes
    learner.residence = Residence("cpu", share, lambda: (device.free + SPARE_BYTES, 100), device.allocate)


def configured(changes: dict[str, Any]) -> UpdateConfig:
    return settings(**{"kl_coefficient": 0.0, "learning_rate": 0.01, **changes})


def opened(start: Path, config: UpdateConfig) -> Learner:
    learner = make_learner(start, config)
    if config.kl_coefficient:
        learner.load_reference(start)
    return learner


def turn(learner: Learner, start: Path) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(start), rollouts)))
    stored = Stored()
    if learner.config.kl_coefficient:
        stored.reference = learner.reference_logprobs(rollouts, np.arange(ROWS))
    learner.step(rollouts, np.arange(ROWS), whole_step(rollouts), stored)


@pytest.mark.parametrize("case", CASES)
def test_it_leaves_and_comes_back_as_it_was_in_memory_made_once(case: str, untied: Path) -> None:
    changes, each = CASES[case]
    learner, stays = (opened(untied, configured(changes)) for _ in range(2))
    parameters = sum(p.numel() for p in learner.model.parameters())
    buffers = sum(b.nbytes for b in learner.model.buffers()) * len(learner.layouts)
    device, allocated = Device(free=49), []
    settle(learner, device)
    for _ in range(4):
        for one in (learner, stays):
            one.resume()
            turn(one, untied)
        with Moved() as moved:
            learner.release()
        # Beside them a count of steps for each parameter, and what a rotary embedding keeps.
        small = buffers + 4 * len(learner.optimizer.state)
        assert moved.num_bytes == int(each * parameters) + small
        assert learner.residence.is_away
        assert all(p.grad is None for p in learner.model.parameters())
        allocated.append(sum(device.allocated.values()))
        with Moved() as back:
            learner.resume()
        assert back.num_bytes == moved.num_bytes
    assert len(set(allocated)) == 1
    assert len(allocated) == 4
    assert allocated[0] > 3 * len(weights_of(learner))
    for name, weight in weights_of(stays).items():
        assert torch.equal(weights_of(learner)[name], weight)


def test_it_stays_where_it_fits(untied: Path) -> None:
    learner, device = opened(untied, configured({"kl_coefficient": 0.1})), Device(free=50)
    settle(learner, device)
    turn(learner, untied)
    pointers = {name: p.data_ptr() for name, p in weights_of(learner).items()}
    with Moved() as moved:
        learner.release()
        learner.resume()
    assert moved.num_bytes == 0
    assert not device.allocated
    assert pointers == {name: p.data_ptr() for name, p in weights_of(learner).items()}
    assert all(p.grad is None for p in learner.model.parameters())


def test_what_waits_can_be_written_and_other_weights_are_loaded_into_it(tmp_path: Path, untied: Path) -> None:
    learner = opened(untied, configured({}))
    first = save_learner(learner, untied, tmp_path / "first")
    settle(learner, Device(free=0))
    turn(learner, untied)
    here = save_learner(learner, untied, tmp_path / "here")
    learner.release()
    away = save_learner(learner, untied, tmp_path / "away")
    for name in ("policy/model.safetensors", OPTIMIZER_FILE):
        assert (away / name).read_bytes() == (here / name).read_bytes()
    learner.load(first / "policy", None, "first")
    learner.release()
    learner.load(away / "policy", away, "away")
    again = save_learner(learner, untied, tmp_path / "again")
    for name in ("policy/model.safetensors", OPTIMIZER_FILE):
        assert (again / name).read_bytes() == (here / name).read_bytes()


def test_others_share_is_what_the_engine_is_given(tmp_path: Path, untied: Path) -> None:
    config = configuration()
    for options, share in (({}, 0.85), ({"gpu_memory_utilization": 0.4}, 0.4)):
        generate = config.generate.model_copy(update={"engine_options": options})
        run = make_run(
            tmp_path / str(share), config.model_copy(update={"generate": generate}), untied, untied
        )
        with stage.open_resource(run, None) as policies:
            assert policies.learner.residence.share == share


def test_on_a_cpu_nothing_moves_and_gradients_go(untied: Path) -> None:
    learner = opened(untied, configured({}))
    turn(learner, untied)
    assert all(p.grad is not None for p in learner.model.parameters())
    with Moved() as moved:
        learner.release()
    assert moved.num_bytes == 0
    assert all(p.grad is None for p in learner.model.parameters())
    assert not learner.residence.is_away
