"""Two processes of a torch.distributed group (gloo) against one: the same step, each with a share of it."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor, distributed, multiprocessing
from transformers import Qwen2ForCausalLM

from grpo.config import Config, UpdateConfig
from grpo.update import parallel
from grpo.update.batch import Rollouts
from grpo.update.learner import Learner
from grpo.update.objective import Stored, Sums, objective_of, step_of

pytestmark = pytest.mark.xdist_group("parallel")  # the group is started once, for all tests
WORLD = 2
MAX_NEW_TOKENS = 9
# Two groups of several, each a tree or more; and one rollout, which is one tree.
SEVERAL = [[3, 9, 1], [5, 2, 8, 4]]
ALONE = [[7]]
CASES: dict[str, tuple[str, list[list[int]]]] = {
    "grpo": ("grpo", SEVERAL),
    "dapo": ("dapo", SEVERAL),
    "grpo, one rollout": ("grpo", ALONE),
    "dapo, one rollout": ("dapo", ALONE),
    "gspo": ("gspo", SEVERAL),
    "gmpo": ("gmpo", SEVERAL),
    "scalerl": ("scalerl", SEVERAL),
}


def settings(objective: str) -> UpdateConfig:
    document = {
        "run": "tiny",
        "model": "unused",
        "prompts": {"source": "unused"},
        "score": {"rewards": [{"function": "exact_answer"}]},
        "update": {
            "objective": objective,
            "learning_rate": 0.01,
            "max_tokens_per_batch": 24,
            "entropy_coefficient": 0.01 if objective == "dapo" else 0.0,
            "max_grad_norm": 0.5,
            **({"off_policy_mask": 0.01, "top_entropy": 0.5} if objective == "scalerl" else {}),
        },
    }
    return Config.model_validate(document).update


def make_rollouts(lengths: list[list[int]]) -> Rollouts:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(tiny.BYTES, size=4 + group) for group in range(len(lengths))]
    keys = [[0, group, sample] for group, each in enumerate(lengths) for sample in range(len(each))]
    responses = [draw.integers(tiny.BYTES, size=length) for each in lengths for length in each]
    return Rollouts(
        keys=np.array(keys),
        prompts=[prompts[group] for _, group, _ in keys],
        responses=responses,
        masks=[np.ones(len(response), dtype=bool) for response in responses],
        old_logprobs=[draw.normal(-5, 0.3, len(response)).astype(np.float32) for response in responses],
        advantages=draw.normal(size=len(keys)),
        temperatures=np.full(len(keys), 0.8),
    )


def step(folder: Path, objective: str, lengths: list[list[int]]) -> dict[str, Any]:
    """One step of this process: its share, or all of it where there is no group."""
    torch.set_num_threads(1)
    config, rollouts = settings(objective), make_rollouts(lengths)
    learner = Learner(config, "cpu")
    learner.load(folder / "policy", None, "start")
    everything, stored = np.arange(len(rollouts)), Stored()
    if config.kl_coefficient:
        learner.load_reference(folder / "reference")
        stored.reference = learner.reference_logprobs(rollouts, everything)
    if config.top_entropy is not None:
        stored.entropy = learner.policy_entropies(rollouts, everything)[1]
    whole = step_of(config, rollouts, everything, MAX_NEW_TOKENS, stored)
    row, policy = learner.step(rollouts, everything, whole, stored)
    named = dict(learner.model.named_parameters())
    return {
        "row": row,
        "gradients": {name: p.grad for name, p in named.items()},
        "weights": {name: p.detach() for name, p in named.items()},
        "policy": policy,
        "reference": stored.reference,
    }


def as_process(rank: int, folder: Path) -> None:
    """What each process of the group does: all cases, one after another, their results to disk."""
    method = f"file://{folder / 'meeting'}"
    patience = timedelta(seconds=180)  # of a process that waits for one that does something else
    distributed.init_process_group("gloo", init_method=method, timeout=patience, rank=rank, world_size=WORLD)
    try:
        assert parallel.share() == (rank, WORLD)
        results = {case: step(folder, *CASES[case]) for case in CASES}
        torch.save(results, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, list[Results]]:
    """Of every case: what one process found, and what each of the group did."""
    folder = tmp_path_factory.mktemp("parallel")
    for seed, name in enumerate(("policy", "reference")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            Qwen2ForCausalLM(tiny.qwen2(initializer_range=0.1)).save_pretrained(folder / name)
    one = {case: step(folder, *CASES[case]) for case in CASES}
    multiprocessing.spawn(as_process, args=(folder,), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
    return one, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| over the parameters."""
    assert found.keys() == expected.keys()
    errors = [(found[name] - expected[name]).norm() / expected[name].norm() for name in expected]
    return float(max(errors))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(results: tuple[Results, list[Results]], case: str) -> None:
    one, group = results[0][case], [each[case] for each in results[1]]
    for found in group:
        assert deviation(found["gradients"], one["gradients"]) <= 1e-5
        # AdamW's first step moves each weight by the learning rate, 0.01, and rounding cannot turn it round.
        for name, weight in found["weights"].items():
            assert (weight - one["weights"][name]).abs().max() <= 1e-4, name
        assert found["row"].keys() == one["row"].keys()
        for name, value in one["row"].items():
            close = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)
            assert found["row"][name] == close, name
        for name in ("clip_fraction_low", "clip_fraction_high"):
            assert found["row"][name] == one["row"][name]
    # All processes have the same bits: they never drift apart.
    for name, weight in group[0]["weights"].items():
        assert torch.equal(weight, group[1]["weights"][name])
        assert torch.equal(group[0]["gradients"][name], group[1]["gradients"][name])
    assert group[0]["row"] == group[1]["row"]


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_what_its_share_read_and_all_of_the_reference(
    results: tuple[Results, list[Results]], case: str
) -> None:
    one, group = results[0][case], [each[case] for each in results[1]]
    held = [set(found["policy"]) for found in group]
    assert held[0] | held[1] == set(one["policy"])
    assert not held[0] & held[1]
    # Later steps are cut otherwise: what a process needs then may have been another's to compute.
    assert [set(found["reference"]) for found in group] == [set(one["reference"])] * 2
    for name in ("policy", "reference"):
        for found in group:
            for row, logprobs in found[name].items():
                np.testing.assert_allclose(logprobs, one[name][row], atol=1e-5)
    lengths = CASES[case][1]
    if len(lengths) == 1:  # one tree: the second process had nothing to read
        assert [len(found["policy"]) for found in group] == [1, 0]
    else:
        assert all(found["policy"] for found in group)
    assert bool(one["reference"]) == (CASES[case][0] == "grpo")


def test_without_a_group_a_process_has_all_of_it() -> None:
    assert parallel.share() == (0, 1)
    assert parallel.gathered(1.5) == [1.5]
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[1.0, 2.0]])
    parallel.add_up_gradients(model)
    assert model.weight.grad.tolist() == [[1, 2]]


def test_sums_by_hand() -> None:
    # Everything is added but the largest ratio.
    first = Sums(
        policy_loss=1.0,
        tokens=3.0,
        entropy=6.0,
        ratio=2.0,
        ratios=2.0,
        clipped_low=1.0,
        clips=2.0,
        rollouts=1.0,
        largest=1.5,
    )
    second = Sums(
        policy_loss=0.5, tokens=1.0, entropy=4.0, ratio=4.0, ratios=2.0, clips=2.0, rollouts=1.0, largest=1.25
    )
    row = (first + second).row(objective_of(settings("dapo")))
    assert (row["policy_loss"], row["ratio_max"], row["kl"]) == (1.5, 1.5, None)
    assert (row["entropy"], row["ratio_mean"]) == (10 / 4, 6 / 4)
    assert (row["clip_fraction_low"], row["clip_fraction_high"]) == (1 / 4, 0)
