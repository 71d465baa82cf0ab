"""The learner on tiny real models: which layout it takes, what is not finite, stopping and going on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.update.examples import (
    EOS,
    OPTIMIZER_FILE,
    RARE,
    ROWS,
    VOCAB,
    all_logprobs,
    as_old,
    deviation,
    in_double,
    make_learner,
    make_rollouts,
    permuted,
    save_learner,
    settings,
    step_gradient,
    weights_of,
    whole_step,
)
from transformers import Llama4ForCausalLM, Llama4TextConfig

from grpo.errors import EngineError
from grpo.update.batch import Rollouts
from grpo.update.learner import Learner
from grpo.update.network import TOLERANCE
from grpo.update.objective import Stored, needed


def save_llama4(folder: Path) -> Path:
    """Attention reaches back to multiples of 8 tokens: make_rollouts() has sequences of up to 14."""
    config = Llama4TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_local_experts=2,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "chunked_attention"],
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Llama4ForCausalLM
        model(config).save_pretrained(folder)
    return folder


def test_a_layout_that_is_right_is_kept(untied: Path, other: Path) -> None:
    rollouts = make_rollouts()
    learner = make_learner(untied, settings())
    learner.load_reference(other)
    found = learner.check_layout(rollouts, (30, 30))
    assert found.keys() == {"layout", "policy_layout_difference", "reference_layout_difference"}
    assert found["layout"] == "shared"
    assert 0 < found["policy_layout_difference"] <= 1e-5
    assert 0 < found["reference_layout_difference"] <= 1e-5
    apart = make_learner(untied, settings(prompt_sharing="off"))
    found = apart.check_layout(rollouts, (30, 30))
    assert found.keys() == {"layout", "policy_layout_difference"}
    assert found["layout"] == "packed"
    assert found["policy_layout_difference"] <= 1e-5


@pytest.mark.parametrize("long", ["the rollouts", "what the run allows"])
def test_a_layout_that_is_wrong_is_left(tmp_path: Path, long: str) -> None:
    rollouts = make_rollouts()
    learner = make_learner(save_llama4(tmp_path / "llama4"), settings())
    assert learner.check_layout(rollouts, (6, 8)) == {"layout": "rows"}
    learner = make_learner(tmp_path / "llama4", settings())
    learner.network.best = "shared"  # as if its configuration did not say that it has a window
    sizes = [len(rollouts.prompts[i]) + len(rollouts.responses[i]) for i in range(ROWS)]
    of_group = np.array([max(sizes[i] for i in range(ROWS) if g == rollouts.keys[i, 1]) for g in range(5)])
    short = permuted(rollouts, np.flatnonzero(of_group[rollouts.keys[:, 1]] <= 8))
    assert 1 < len(short) < ROWS
    if long == "the rollouts":
        found = learner.check_layout(rollouts, (3, 4))
    else:
        found = learner.check_layout(short, (6, 8))
    assert found.pop("policy_layout_difference") > 10 * TOLERANCE
    assert found.pop("policy_layout_refused") == "shared"
    assert found == {"layout": "rows"}
    read = learner.policy_logprobs(rollouts, np.arange(ROWS))
    for i, row in enumerate(all_logprobs(in_double(tmp_path / "llama4"), rollouts)):
        np.testing.assert_allclose(read[i], row, atol=5e-6)
    # Below the window nothing shows.
    learner = make_learner(tmp_path / "llama4", settings())
    learner.network.best = "shared"
    found = learner.check_layout(short, (3, 4))
    assert found["layout"] == "shared"
    assert found["policy_layout_difference"] <= 1e-5


def test_what_an_iteration_compares_does_not_depend_on_the_process(untied: Path, other: Path) -> None:
    # Nothing to train on: what is left to compare is the made-up pair.
    nothing = permuted(make_rollouts(), np.arange(0))
    stays, starts = (make_learner(untied, settings()) for _ in range(2))
    for learner in (stays, starts):
        learner.load_reference(other)
    first = stays.check_layout(nothing, (30, 30))
    assert first["policy_layout_difference"] is not None
    for last in ("shared", "rows", None):
        found = stays.check_layout(nothing, (30, 30), last)
        assert found == starts.check_layout(nothing, (30, 30), last)
        assert found["reference_layout_difference"] == first["reference_layout_difference"]
        assert (found["policy_layout_difference"] is None) == (last == "shared")


def test_a_step_without_a_learning_rate_has_the_configured_one(untied: Path) -> None:
    rollouts = make_rollouts()
    learner = make_learner(untied, settings(kl_coefficient=0.0, learning_rate=0.01))
    rates = []
    for given in (0.5, None):
        learner.step(rollouts, np.arange(ROWS), whole_step(rollouts), Stored(), given)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.01]


def expect_error(learner: Learner, rollouts: Rollouts, stored: Stored, message: str) -> None:
    weights = {name: p.clone() for name, p in weights_of(learner).items()}
    read = np.flatnonzero(needed(learner.config, rollouts))
    with pytest.raises(EngineError, match=message) as caught:
        learner.step(rollouts, read, whole_step(rollouts), stored)
    assert caught.value.exit_code == 8
    assert not learner.optimizer.state
    for name, p in weights_of(learner).items():
        assert torch.equal(p.nan_to_num(), weights[name].nan_to_num())


def test_nan_weights_name_the_rollouts_that_meet_them(untied: Path) -> None:
    learner = make_learner(untied, settings(kl_coefficient=0.0))
    with torch.no_grad():
        weights_of(learner)["model.embed_tokens.weight"][RARE] = math.nan
    message = (
        r"^update: policy_logprobs are not finite on rollouts \(iteration, group_id, sample_id\) \(0, 1, 1\);"
        r" nothing was committed$"
    )
    expect_error(learner, make_rollouts(), Stored(), message)


def test_nan_weights_everywhere_name_the_first_rollouts(untied: Path) -> None:
    learner = make_learner(untied, settings(kl_coefficient=0.0))
    with torch.no_grad():
        weights_of(learner)["lm_head.weight"].fill_(math.nan)
    expect_error(learner, make_rollouts(), Stored(), r"\(0, \d, \d\), .* and 5 more; nothing was committed$")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite(untied: Path, value: float) -> None:
    rollouts = make_rollouts()
    learner = make_learner(untied, settings(kl_coefficient=0.1, max_tokens_per_batch=1))
    stored = Stored()
    learner.load_reference(untied)
    stored.reference = learner.reference_logprobs(rollouts, np.arange(len(rollouts)))
    stored.reference[7][:] = value
    expect_error(learner, rollouts, stored, r"^update: reference_logprobs are not finite on .* \(0, 2, 0\);")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_old_logprob_that_is_not_finite(untied: Path, value: float) -> None:
    rollouts = make_rollouts()
    rollouts.old_logprobs[4][0] = value
    learner = make_learner(untied, settings(kl_coefficient=0.0))
    message = r"^update: old_logprobs are not finite on rollouts \([a-z_, ]+\) \(0, 1, 0\); nothing"
    expect_error(learner, rollouts, Stored(), message)


def test_a_gradient_that_overflows_names_its_rollout(untied: Path) -> None:
    # 1e38 is a float32; times hidden states above 3.4 it is none any more.
    rollouts = make_rollouts()
    rollouts = replace(rollouts, advantages=np.where(np.arange(ROWS) == 9, 1e38, rollouts.advantages))
    learner = make_learner(untied, settings("grpo_sequence", kl_coefficient=0.0, learning_rate=0.1))
    with torch.no_grad():
        weights_of(learner)["model.norm.weight"].fill_(1e4)
        weights_of(learner)["lm_head.weight"].mul_(1e-4)
    message = (
        r"^update: the gradient is (inf|nan) on rollouts \(iteration, group_id, sample_id\) \(0, 2, 2\);"
    )
    expect_error(learner, rollouts, Stored(), message)


def test_the_gradient_is_scaled_down_to_the_given_norm(untied: Path) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    row, free, _ = step_gradient(untied, settings(kl_coefficient=0.0), rollouts)
    limit = row["grad_norm"] / 4
    clipped, found, _ = step_gradient(untied, settings(kl_coefficient=0.0, max_grad_norm=limit), rollouts)
    assert clipped["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-6)  # reported before clipping
    assert deviation({name: 4 * g for name, g in found.items()}, free) <= 1e-4


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_stopping_and_going_on_gives_the_same_bytes(
    tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(model)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(start), rollouts)))
    config = settings(kl_coefficient=0.0, learning_rate=0.01, weight_decay=0.01, max_tokens_per_batch=50)

    def step(learner: Learner) -> None:
        learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())

    through = make_learner(start, config)
    step(through)
    first = save_learner(through, start, tmp_path / "first")
    step(through)
    never_stopped = save_learner(through, start, tmp_path / "never")

    resumed = Learner(config, "cpu")
    resumed.load(first / "policy", first, "a")
    again = save_learner(resumed, start, tmp_path / "again")
    step(resumed)
    stopped = save_learner(resumed, start, tmp_path / "stopped")
    # A learner that goes back to the state in memory before is the same too.
    through.load(first / "policy", first, "a")
    step(through)
    rewound = save_learner(through, start, tmp_path / "rewound")

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(again) == content(first)
    assert content(stopped) == content(never_stopped)
    assert content(rewound) == content(never_stopped)
    assert content(first)["model.safetensors"] != content(never_stopped)["model.safetensors"]
    assert content(first)[OPTIMIZER_FILE] != content(never_stopped)[OPTIMIZER_FILE]


def test_a_learner_that_never_stepped_has_no_moments(tmp_path: Path, tied: Path) -> None:
    learner = make_learner(tied, settings())
    folder = save_learner(learner, tied, tmp_path / "saved")
    fresh = Learner(settings(), "cpu")
    fresh.load(folder / "policy", folder, "a")
    assert not fresh.optimizer.state
