"""The learner and its stage on tiny real models, against plain separate sequences."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests import restatement, tiny
from tests.restatement import Objective, Response
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

from grpo import probe, tables
from grpo.artifacts import Plan, Run, Staging, id_of
from grpo.config import Config, UpdateConfig
from grpo.console import Console
from grpo.errors import CorruptError, EngineError, UsageError
from grpo.model import load_model
from grpo.update import stage
from grpo.update.batch import Rollouts, Rows, kept_rollouts, minibatches
from grpo.update.checkpoint import OPTIMIZER_FILE, optimizer_file, policy_files
from grpo.update.learner import Learner
from grpo.update.loss import Step
from grpo.update.mismatch import mismatch
from grpo.update.network import TOLERANCE
from grpo.update.objective import Stored

VOCAB, EOS, MAX_NEW_TOKENS = 50, 2, 8
RARE = 41  # a token that only one rollout holds
ROWS = 14  # of make_rollouts()
Gradient = dict[str, Tensor]


def save_checkpoint(folder: Path, *, tied: bool = False, seed: int = 0, dropout: float = 0.5) -> Path:
    """A Qwen2 with random weights; its dropout must never act."""
    config = tiny.qwen2(
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        initializer_range=0.2,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "untied")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tied", tied=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that is not the policy."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which gradient checkpointing would switch on."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "still", dropout=0.0)


def settings(objective: str = "grpo", **update: Any) -> UpdateConfig:
    return configuration(objective, **update).update


def configuration(objective: str = "grpo", **update: Any) -> Config:
    return Config.model_validate(
        {
            "run": "tiny",
            "model": "unused",
            "prompts": {"source": "unused"},
            "score": {"rewards": [{"function": "exact_answer"}]},
            "update": {"objective": objective, "max_grad_norm": None, **update},
        }
    )


def make_learner(checkpoint: Path, config: UpdateConfig, *, double: bool = False) -> Learner:
    learner = Learner(config, "cpu")
    learner.load(checkpoint, None, ("start", None))
    if double:
        learner.model.double()
    return learner


def load(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The model as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()  # type: ignore[no-untyped-call]


def in_double(checkpoint: Path) -> Any:
    return load(checkpoint, torch.float64)


def make_rollouts(seed: int = 0) -> Rollouts:
    """Five groups of 4, 3, 4, 1 and 2 rollouts; lengths 1 to 8, several temperatures, masks with holes.

    Most responses end in the end-of-sequence token, which is the pad token too, and one is nothing else.
    """
    draw = np.random.default_rng(seed)
    keys, prompts, responses, masks, temperatures = [], [], [], [], []
    for group, size in enumerate((4, 3, 4, 1, 2)):
        prompt = draw.integers(3, 40, draw.integers(1, 7))
        for sample in range(size):
            length = 1 if sample == 2 else int(draw.integers(2, MAX_NEW_TOKENS + 1))
            response = draw.integers(3, 40, length)
            if sample != 0:
                response[-1] = EOS
            mask = np.ones(length, dtype=bool)
            if sample == 1:
                mask[0] = False
            keys.append([0, group, sample])
            prompts.append(prompt)
            responses.append(response)
            masks.append(mask)
            temperatures.append([1.0, 0.75, 1.5, 1.0, 2.0][group])
    responses[5][0] = RARE
    advantages = draw.normal(size=len(keys)).astype(np.float32).astype(np.float64)
    advantages[3] = 0.0
    return Rollouts(
        keys=np.array(keys, dtype=np.int64),
        prompts=prompts,
        responses=responses,
        masks=masks,
        old_logprobs=[np.zeros(mask.sum(), dtype=np.float32) for mask in masks],
        advantages=advantages,
        temperatures=np.array(temperatures),
    )


def one_rollout(model: Any, rollouts: Rollouts, i: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the counted tokens of one rollout: its own forward pass, no padding."""
    tokens = np.concatenate([rollouts.prompts[i], rollouts.responses[i]])
    logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
    logprobs = torch.log_softmax(logits / rollouts.temperatures[i], dim=-1)
    start = len(rollouts.prompts[i])
    places = [start + t for t, counts in enumerate(rollouts.masks[i]) if counts]
    before = torch.stack([logprobs[place - 1] for place in places])
    chosen = torch.stack([logprobs[place - 1, tokens[place]] for place in places])
    return chosen, -(before.exp() * before).sum(dim=-1)


def one_logprobs(model: Any, rollouts: Rollouts, i: int) -> Tensor:
    return one_rollout(model, rollouts, i)[0]


def all_logprobs(model: Any, rollouts: Rollouts) -> list[np.ndarray]:
    with torch.no_grad():
        return [one_logprobs(model, rollouts, i).numpy() for i in range(len(rollouts))]


def as_old(logprobs: list[np.ndarray], noise: float = 0.0, seed: int = 9) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [(row + noise * draw.normal(size=len(row))).astype(np.float32) for row in logprobs]


def whole_step(rollouts: Rollouts, rows: np.ndarray | None = None) -> Step:
    rows = np.arange(len(rollouts)) if rows is None else rows
    return Step(len(rows), int(rollouts.num_tokens[rows].sum()), MAX_NEW_TOKENS)


def gradients(model: Any) -> Gradient:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def deviation(found: Gradient, expected: Gradient) -> float:
    """The largest ||a - b|| / ||b|| over the parameters."""
    assert found.keys() == expected.keys()
    errors: list[float] = [
        (found[name].double() - expected[name].double()).norm().item() / expected[name].double().norm().item()
        for name in expected
    ]
    return max(errors)


def step_gradient(
    checkpoint: Path,
    config: UpdateConfig,
    rollouts: Rollouts,
    reference: Path | list[np.ndarray] | None = None,
    *,
    double: bool = False,
) -> tuple[dict[str, Any], Gradient, Stored]:
    """One step on all rows of `rollouts`, from the checkpoint. reference: a checkpoint, or its log-probs."""
    learner = make_learner(checkpoint, config, double=double)
    everything, stored = np.arange(len(rollouts)), Stored()
    if config.kl_coefficient and isinstance(reference, list):
        stored.reference = dict(enumerate(reference))
    elif config.kl_coefficient:
        assert not isinstance(reference, list)
        learner.load_reference(reference or checkpoint)
        stored.reference = learner.reference_logprobs(rollouts, everything)
    row = learner.step(rollouts, everything, whole_step(rollouts), stored, 0)
    return row, gradients(learner.model), stored


def plain(
    model: Any,
    rollouts: Rollouts,
    rows: np.ndarray,
    old: Rows | None,
    reference: list[np.ndarray],
    objective: Objective,
) -> restatement.Loss:
    """Loss of the plain restatement; puts its gradient into `model`. `old` None: its own log-probs."""
    read = [one_rollout(model, rollouts, i) for i in rows]
    values, entropies = (
        [pair[part].detach().numpy().astype(np.float64).tolist() for pair in read] for part in (0, 1)
    )
    given = values if old is None else [[float(x) for x in old[i]] for i in rows]
    responses = [
        Response(
            float(rollouts.advantages[i]),
            values[n],
            given[n],
            [float(x) for x in reference[i]],
            [True] * len(values[n]),
            [float(x) for x in rollouts.old_logprobs[i]],
            entropies[n],
        )
        for n, i in enumerate(rows)
    ]
    found = restatement.loss(responses, objective)
    model.zero_grad()
    slopes = zip(found.gradient, found.entropy_gradient, strict=True)
    torch.stack(
        [
            (logprobs * logprobs.new_tensor(slope)).sum() + (entropy * entropy.new_tensor(by_entropy)).sum()
            for (logprobs, entropy), (slope, by_entropy) in zip(read, slopes, strict=True)
        ]
    ).sum().backward()  # type: ignore[no-untyped-call]
    return found


def objective_of(config: UpdateConfig) -> Objective:
    return Objective(
        ratio=config.ratio,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregate=config.aggregate,
        kl_coefficient=config.kl_coefficient,
        kl_estimator=config.kl_estimator,
        max_new_tokens=MAX_NEW_TOKENS,
        correction=config.sampler_correction,
        correction_level=config.sampler_correction_level,
        correction_cap=config.sampler_correction_cap,
        surrogate=config.surrogate,
        delta=config.delta,
        kl_importance=config.kl_importance,
        entropy_coefficient=config.entropy_coefficient,
    )


# Under a noise of 0.2 these caps leave some weights alone and take some out.
TRUNCATE: dict[str, Any] = {"sampler_correction": "truncate", "sampler_correction_cap": 1.1}
MASK: dict[str, Any] = {"sampler_correction": "mask", "sampler_correction_cap": 1.1}
BY_ROLLOUT: dict[str, Any] = {"sampler_correction_level": "sequence_mean"}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("grpo", "sampled", {}),
    ("grpo", "recomputed", {}),
    ("grpo_sequence", "sampled", {}),
    ("grpo_sequence", "recomputed", {}),
    ("grpo", "recomputed", TRUNCATE),
    ("grpo", "recomputed", MASK | BY_ROLLOUT),
    ("grpo_sequence", "recomputed", TRUNCATE | BY_ROLLOUT),
    ("dr_grpo", "sampled", {}),
    ("dapo", "sampled", {}),
    ("gspo", "sampled", {}),
    ("gspo", "recomputed", {}),
    ("cispo", "sampled", {"clip_high": 0.1}),  # its own 4.0 is out of reach under this noise
    ("grpo", "sampled", {"delta": 1.25}),
    ("grpo", "sampled", {"kl_importance": True}),
    ("grpo_sequence", "recomputed", {"kl_importance": True}),
    ("dapo", "sampled", {"entropy_coefficient": 0.1}),
    ("gspo", "recomputed", {"entropy_coefficient": 0.1}),
    ("dr_grpo", "sampled", {"delta": 1.25, "kl_importance": True, "entropy_coefficient": 0.1}),
]
OBJECTIVES = ["grpo", "grpo_sequence", "dr_grpo", "dapo", "gspo", "cispo"]


# ---- policy = old policy, policy = reference ----


@pytest.mark.parametrize("old_logprobs", ["sampled", "recomputed"])
@pytest.mark.parametrize(("objective", "by_length"), [("grpo", True), ("grpo_sequence", False)])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_on_policy_the_gradient_is_reinforce_with_baseline(
    model: str, objective: str, by_length: bool, old_logprobs: str, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(model)
    plain_model = load(checkpoint, torch.float32)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(plain_model, rollouts)))
    config = settings(objective, old_logprobs=old_logprobs, kl_coefficient=0.0)
    row, found, _ = step_gradient(checkpoint, config, rollouts)

    assert row["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert row["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert (row["clip_fraction_low"], row["clip_fraction_high"]) == (0, 0)
    if old_logprobs == "recomputed":
        assert (row["ratio_mean"], row["ratio_max"]) == (1, 1)
    assert row["kl"] is None
    for own, sampled in zip(all_logprobs(plain_model, rollouts), rollouts.old_logprobs, strict=True):
        np.testing.assert_allclose(own, sampled, atol=1e-6)

    plain_model.zero_grad()
    for i, advantage in enumerate(rollouts.advantages):
        logprobs = one_logprobs(plain_model, rollouts, i)
        share = 1 / len(rollouts) / (len(logprobs) if by_length else 1)
        (-advantage * share * logprobs.sum()).backward()
    assert deviation(found, gradients(plain_model)) <= 1e-4
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(plain_model).values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", ["grpo", "grpo_sequence"])
def test_kl_of_the_policy_to_itself_is_zero(untied: Path, objective: str, estimator: str) -> None:
    rollouts = replace(make_rollouts(), old_logprobs=as_old(all_logprobs(in_double(untied), make_rollouts())))
    config = settings(objective, kl_estimator=estimator, kl_coefficient=0.5)
    row, found, _ = step_gradient(untied, config, rollouts)
    assert row["kl"] == 0
    assert row["loss"] == row["policy_loss"]
    without, gradient, _ = step_gradient(untied, settings(objective, kl_coefficient=0.0), rollouts)
    # Without a KL term the rollout of advantage 0 takes no forward pass: other batches, other rounding.
    assert row["policy_loss"] == pytest.approx(without["policy_loss"], rel=1e-6)
    if estimator != "k1":  # at d = 0 the gradient of k2 and k3 is 0; that of k1 never is
        assert deviation(found, gradient) <= 1e-5
    else:
        assert deviation(found, gradient) > 1e-2


# ---- invariance ----


def permuted(rollouts: Rollouts, order: np.ndarray) -> Rollouts:
    def lists(values: Rows) -> list[np.ndarray]:
        return [values[i] for i in order]

    return Rollouts(
        keys=rollouts.keys[order],
        prompts=lists(rollouts.prompts),
        responses=lists(rollouts.responses),
        masks=lists(rollouts.masks),
        old_logprobs=lists(rollouts.old_logprobs),
        advantages=rollouts.advantages[order],
        temperatures=rollouts.temperatures[order],
    )


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-5), (True, 1e-7)])
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        *((objective, {}) for objective in OBJECTIVES),
        ("grpo", {"aggregate": "token_mean", "kl_importance": True}),
        ("grpo_sequence", {"aggregate": "token_mean"}),
        ("dr_grpo", {"kl_coefficient": 0.1, "entropy_coefficient": 0.1}),
    ],
)
def test_loss_and_gradient_do_not_depend_on_how_they_are_computed(
    still: Path, other: Path, objective: str, changes: dict[str, Any], double: bool, tolerance: float
) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(still), rollouts), 0.3))
    order = np.random.default_rng(4).permutation(len(rollouts))
    whole = settings(objective, old_logprobs="sampled", kl_estimator="k3", **changes)
    # In double the reference's log-probs are given: it would compute them in float32.
    given = as_old(all_logprobs(in_double(other), rollouts)) if double else None
    row, expected, _ = step_gradient(still, whole, rollouts, given or other, double=double)
    ways: list[tuple[dict[str, Any], Rollouts]] = [
        ({"max_tokens_per_batch": 1}, rollouts),
        ({"max_tokens_per_batch": 20}, rollouts),
        ({"max_tokens_per_batch": 33}, permuted(rollouts, order)),
        ({"prompt_sharing": "off"}, rollouts),
        ({"prompt_sharing": "off", "max_tokens_per_batch": 33}, permuted(rollouts, order)),
        ({"gradient_checkpointing": True}, rollouts),
        ({"gradient_checkpointing": True, "prompt_sharing": "off", "max_tokens_per_batch": 20}, rollouts),
    ]
    largest = 0.0
    for keys, rows in ways:
        config = whole.model_copy(update=keys)
        mine = given and (given if rows is rollouts else [given[i] for i in order])
        again, found, _ = step_gradient(still, config, rows, mine or other, double=double)
        largest = max(largest, deviation(found, expected))
        assert largest <= tolerance, keys
        for name in ("loss", "policy_loss", "kl", "entropy", "ratio_mean", "ratio_max", "grad_norm"):
            close = row[name] if row[name] is None else pytest.approx(row[name], rel=1e-5, abs=1e-6)
            assert again[name] == close, (keys, name)
        for name in ("clip_fraction_low", "clip_fraction_high"):
            assert again[name] == row[name], (keys, name)
    clipped = row["clip_fraction_low"] + row["clip_fraction_high"]
    assert (clipped > 0) == (objective != "cispo")  # a ratio of 5 is out of reach
    print(f"{objective} {changes or ''} {'float64' if double else 'float32'}: {largest:.1e}")


# ---- the whole update against the plain restatement ----


def commit_table(
    run: Run, table: str, iteration: int, data: pa.Table, config: dict[str, Any] | None = None
) -> None:
    staging = Staging(run, Plan(table, 1, table, iteration, config or {}, {}), 0)
    record = staging.write_table(table, staging.file_name("part", 0), data)
    staging.commit({table: id_of([record])}, [record], {})


def make_run(root: Path, config: Config, policy: Path, reference: Path) -> Run:
    run = Run(root, config, root, Console(quiet=True))
    staging = Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0)
    sequences = probe.probe_sequences([range(10)], context=None)
    record = staging.write_bytes("", probe.FILE, probe.measure(load_model(policy, "cpu"), sequences).encode())
    staging.commit({"policy": "start", "reference": "reference"}, [record], {})
    staging = Staging(run, Plan("prompts", 1, "prompts", None, {}, {}), 0)
    staging.commit({"prompts": "prompts"}, [], {"longest_prompt_tokens": 6})
    run.start = {"policy": policy, "reference": reference}
    return run


def commit_rollouts(run: Run, iteration: int, kept: Rollouts, unkept: Rollouts | None = None) -> None:
    """`rollouts` and `advantages` of an iteration, the rollouts that are not kept in front."""
    rows, advantages = [], []
    for rollouts, keep in ((unkept, False), (kept, True)):
        for i in range(len(rollouts) if rollouts else 0):
            assert rollouts is not None
            old = np.full(len(rollouts.masks[i]), -50.0)  # where the mask is false, nothing may read it
            old[rollouts.masks[i]] = rollouts.old_logprobs[i]
            group, sample = rollouts.keys[i, 1:].tolist()
            key = {"iteration": iteration, "group_id": group if keep else group - 100, "sample_id": sample}
            rows.append(
                {
                    **key,
                    "prompt_token_ids": rollouts.prompts[i].tolist(),
                    "response_token_ids": rollouts.responses[i].tolist(),
                    "old_logprobs": old.tolist(),
                    "response_mask": rollouts.masks[i].tolist(),
                    "response_tokens": len(old),
                    "temperature": float(rollouts.temperatures[i]),
                }
            )
            advantage = float(rollouts.advantages[i]) if keep else None
            advantages.append({**key, "advantage": advantage, "keep": keep})
    config = {"generate": {"max_new_tokens": MAX_NEW_TOKENS}}
    schema = tables.schema
    commit_table(run, "rollouts", iteration, pa.Table.from_pylist(rows, schema=schema("rollouts")), config)
    commit_table(run, "advantages", iteration, pa.Table.from_pylist(advantages, schema=schema("advantages")))


def update(run: Run, iteration: int, learner: Learner) -> list[dict[str, Any]]:
    stage.run(run, iteration, Staging(run, stage.plan(run, iteration), 0), learner)
    rows: list[dict[str, Any]] = run.read("updates", iteration).to_pylist()
    return rows


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize(("objective", "old_logprobs", "changes"), CASES)
def test_update_equals_the_plain_restatement(
    tmp_path: Path,
    untied: Path,
    other: Path,
    objective: str,
    old_logprobs: str,
    changes: dict[str, Any],
    epochs: int,
    steps: int,
) -> None:
    rollouts = make_rollouts()
    start = all_logprobs(in_double(untied), rollouts)
    rollouts = replace(rollouts, old_logprobs=as_old(start, 0.2))
    config = configuration(
        objective,
        old_logprobs=old_logprobs,
        epochs=epochs,
        steps_per_iteration=steps,
        max_tokens_per_batch=40,
        learning_rate=0.003,
        kl_coefficient=0.2,
        **changes,
    )
    run = make_run(tmp_path, config, untied, other)
    commit_rollouts(run, 0, rollouts, unkept=permuted(rollouts, np.arange(2)))
    learner = make_learner(untied, config.update, double=True)
    table = update(run, 0, learner)
    stored = run.read("logprobs", 0).to_pylist()
    assert [[row["group_id"], row["sample_id"]] for row in stored] == rollouts.keys[:, 1:].tolist()

    # These are stored in float32; the restatement takes them as stored, once they are known to be right.
    recomputed = [np.array(row["policy_logprobs"]) for row in stored]
    reference = [np.array(row["reference_logprobs"]) for row in stored]
    for ours, theirs in zip(reference, all_logprobs(in_double(other), rollouts), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    model = in_double(untied)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.003, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    old = rollouts.old_logprobs if old_logprobs == "sampled" else recomputed
    first_read: dict[int, int] = {}
    corrected = "sampler_correction" in changes
    number = 0
    for epoch in range(epochs):
        for rows in minibatches(rollouts.keys, steps, 0, 0, epoch):
            first_read |= {int(i): number for i in rows if int(i) not in first_read}
            if epoch == 0:
                for i in rows:
                    own = start[i]
                    if old_logprobs == "sampled":  # read by the policy as it is at this step
                        own = one_logprobs(model, rollouts, i).detach().numpy()
                    np.testing.assert_allclose(recomputed[i], own, atol=1e-5)
            expected = plain(model, rollouts, rows, old, reference, objective_of(config.update))
            row = table[number]
            # AdamW turns rounding into moves, so later steps are a little further off; and sampler weights,
            # made of stored log-probs, are in float32 from the first step on.
            tolerance = (1e-6 if corrected else 1e-7) if number == 0 else 1e-5
            close = partial(pytest.approx, rel=tolerance, abs=tolerance)
            assert row["loss"] == close(expected.loss)
            assert row["policy_loss"] == close(expected.policy_loss)
            assert row["kl"] == close(expected.kl)
            if config.update.entropy_coefficient:
                rest = row["policy_loss"] + 0.2 * row["kl"] - row["loss"]
                assert rest == close(config.update.entropy_coefficient * expected.entropy)
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients(model).values()))
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert (row["epoch"], row["step"], row["skipped"]) == (epoch, number, False)
            assert (row["rollouts"], row["tokens"]) == (len(rows), rollouts.num_tokens[rows].sum())
            assert (row["mismatch_mean"] is None) == (number > 0)
            optimizer.step()
            number += 1
    assert len(table) == number
    assert deviation(gradients(learner.model), gradients(model)) <= 1e-5
    assert [row["step"] for row in stored] == [first_read[i] for i in range(len(rollouts))]
    rows = minibatches(rollouts.keys, steps, 0, 0, 0)[0]
    own, sampled = [start[i].tolist() for i in rows], [rollouts.old_logprobs[i].tolist() for i in rows]
    by_token = changes.get("sampler_correction_level", "token") == "token"
    cap = changes.get("sampler_correction_cap", 2.0) if by_token else 2.0
    gaps = restatement.mismatch(own, sampled, cap)
    assert table[0]["mismatch_mean"] == pytest.approx(gaps.mean, rel=1e-5)
    assert table[0]["mismatch_max"] == pytest.approx(gaps.maximum, rel=1e-5)
    assert table[0]["mismatch_kl"] == pytest.approx(gaps.kl, rel=1e-4)
    assert table[0]["effective_sample_size"] == pytest.approx(gaps.effective_sample_size, rel=1e-5)
    assert table[0]["over_cap_fraction"] == gaps.over_cap


@pytest.mark.parametrize("kl_coefficient", [None, 0.2])
@pytest.mark.parametrize(("objective", "old_logprobs", "changes"), CASES)
def test_one_step_equals_the_plain_restatement_closely(
    untied: Path,
    other: Path,
    objective: str,
    old_logprobs: str,
    changes: dict[str, Any],
    kl_coefficient: float | None,
) -> None:
    """kl_coefficient None: the objective's own, which is 0 for most."""
    rollouts = make_rollouts()
    start = all_logprobs(in_double(untied), rollouts)
    rollouts = replace(rollouts, old_logprobs=as_old(start, 0.2))
    keys = changes if kl_coefficient is None else changes | {"kl_coefficient": kl_coefficient}
    config = settings(objective, old_logprobs=old_logprobs, max_tokens_per_batch=40, **keys)
    row, found, stored = step_gradient(untied, config, rollouts, other, double=True)
    read = sorted(stored.policy)
    assert len(read) == (ROWS if config.kl_coefficient or config.entropy_coefficient else ROWS - 1)
    reference = [stored.reference.get(i, start[i]) for i in range(ROWS)]
    model = in_double(untied)
    # pi_old is in float32 either way: the learner's own as it stored them.
    old = rollouts.old_logprobs
    if old_logprobs == "recomputed":
        old = [stored.policy.get(i, start[i]) for i in range(ROWS)]
    expected = plain(model, rollouts, np.arange(ROWS), old, reference, objective_of(config))
    # The weights are made of stored float32 log-probs, in float32.
    tolerance = 1e-6 if "sampler_correction" in changes else 2e-7
    gap = deviation(found, gradients(model))
    print(f"{objective}, pi_old {old_logprobs}, {keys or ''}: {gap:.1e}")
    assert gap <= tolerance
    assert row["loss"] == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    assert row["kl"] == (pytest.approx(expected.kl, rel=1e-7) if config.kl_coefficient else None)
    entropy = torch.cat([one_rollout(model, rollouts, i)[1] for i in read]).mean().item()
    assert row["entropy"] == pytest.approx(entropy, rel=1e-7)
    if config.ratio == "token":  # fractions are of what was read
        share = rollouts.num_tokens.sum() / rollouts.num_tokens[read].sum()
        if len(read) == ROWS or objective != "cispo":  # which counts tokens of advantage 0 too
            assert row["clip_fraction_low"] == pytest.approx(expected.clipped_low * share)
            assert row["clip_fraction_high"] == pytest.approx(expected.clipped_high * share)
        assert (old_logprobs == "sampled") == (expected.clipped_low + expected.clipped_high > 0)


# ---- sampler correction ----

CORRECTIONS = [
    ("grpo", TRUNCATE),
    ("grpo", MASK),
    ("grpo", TRUNCATE | BY_ROLLOUT),
    ("grpo", MASK | BY_ROLLOUT),
    ("grpo_sequence", TRUNCATE | BY_ROLLOUT),
    ("grpo_sequence", MASK | BY_ROLLOUT),
]


@pytest.mark.parametrize(("objective", "correction"), CORRECTIONS)
def test_a_corrected_gradient_does_not_depend_on_batches_or_order(
    untied: Path, other: Path, objective: str, correction: dict[str, Any]
) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.3))
    order = np.random.default_rng(4).permutation(len(rollouts))
    whole = settings(objective, old_logprobs="recomputed", kl_estimator="k3", **correction)
    row, expected, _ = step_gradient(untied, whole, rollouts, other)
    for max_tokens, rows in [(1, rollouts), (20, rollouts), (33, permuted(rollouts, order))]:
        config = whole.model_copy(update={"max_tokens_per_batch": max_tokens})
        again, found, _ = step_gradient(untied, config, rows, other)
        assert deviation(found, expected) <= 1e-5
        assert again["policy_loss"] == pytest.approx(row["policy_loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("objective", "correction"), CORRECTIONS)
def test_a_correction_changes_loss_gradient_and_its_own_cap_alone(
    tmp_path: Path, untied: Path, other: Path, objective: str, correction: dict[str, Any]
) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.3))
    tables_of = []
    for name, keys in (("without", {}), ("with", correction)):
        config = configuration(objective, old_logprobs="recomputed", **keys)
        run = make_run(tmp_path / name, config, untied, other)
        commit_rollouts(run, 0, rollouts)
        tables_of.append(update(run, 0, Learner(config.update, "cpu")))
    [[without], [corrected]] = tables_of
    differing = {name for name in without if without[name] != corrected[name]}
    capped = {"over_cap_fraction"} & differing  # of a cap of its own for tokens
    assert bool(capped) == (correction.get("sampler_correction_level", "token") == "token")
    assert differing - capped == {"loss", "policy_loss", "grad_norm"}
    assert (corrected["ratio_mean"], corrected["ratio_max"]) == (1, 1)
    assert corrected["loss"] == pytest.approx(corrected["policy_loss"] + 0.01 * corrected["kl"], rel=1e-6)


@pytest.mark.parametrize(("objective", "correction"), CORRECTIONS)
def test_a_sampler_equal_to_the_learner_has_nothing_to_correct(
    tmp_path: Path, untied: Path, objective: str, correction: dict[str, Any]
) -> None:
    # At learning rate 0 the weights are exp(0) = 1 in every step: the same table, bit by bit.
    rollouts = make_rollouts()
    plain_learner = make_learner(untied, settings(objective))
    own = plain_learner.policy_logprobs(rollouts, np.arange(ROWS))
    rollouts = replace(rollouts, old_logprobs=[own[i] for i in range(ROWS)])
    found = []
    for name, keys in (("without", {}), ("with", correction)):
        config = configuration(objective, old_logprobs="recomputed", learning_rate=0.0, epochs=2, **keys)
        run = make_run(tmp_path / name, config, untied, untied)
        commit_rollouts(run, 0, rollouts)
        found.append(update(run, 0, Learner(config.update, "cpu")))
    assert found[0] == found[1]
    assert [row["mismatch_max"] for row in found[0]] == [0, None]


def test_a_step_whose_weights_are_all_masked_has_a_policy_gradient_of_zero(untied: Path) -> None:
    rollouts = make_rollouts()
    far = [row - 1 for row in all_logprobs(load(untied, torch.float32), rollouts)]  # w = e, the cap is 1.1
    config = settings(old_logprobs="recomputed", kl_coefficient=0.0, **MASK)
    row, found, _ = step_gradient(untied, config, replace(rollouts, old_logprobs=far))
    assert (row["loss"], row["policy_loss"], row["grad_norm"]) == (0, 0, 0)
    assert not any(gradient.any() for gradient in found.values())
    assert (row["ratio_mean"], row["ratio_max"]) == (1, 1)


# ---- edges ----


def test_a_response_that_is_only_an_end_of_sequence_equal_to_pad_is_learned(untied: Path) -> None:
    # The longest row pads the other three: what stands behind them must not matter.
    whole = make_rollouts()
    assert whole.responses[2].tolist() == [EOS]
    rows = [0, 2, 6, 9]
    rollouts = permuted(whole, np.array(rows))
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    _, found, _ = step_gradient(untied, settings(kl_coefficient=0.0), rollouts)
    model = in_double(untied)
    empty = [np.zeros(len(row)) for row in rollouts.old_logprobs]
    none = Objective(kl_coefficient=0.0)
    plain(model, rollouts, np.arange(4), rollouts.old_logprobs, empty, none)
    assert deviation(found, gradients(model)) <= 1e-4
    # Each of the lone tokens has a gradient: without them it is another one.
    without = permuted(rollouts, np.array([0]))
    _, other_gradient, _ = step_gradient(untied, settings(kl_coefficient=0.0), without)
    assert deviation(found, other_gradient) > 0.1


def test_the_temperature_of_each_row_is_used(untied: Path) -> None:
    rollouts = make_rollouts()
    learner = make_learner(untied, settings())
    found = learner.policy_logprobs(rollouts, np.arange(len(rollouts)))
    expected = all_logprobs(in_double(untied), rollouts)
    for i, row in enumerate(expected):
        np.testing.assert_allclose(found[i], row, atol=2e-6)
    plain_temperature = replace(rollouts, temperatures=np.ones(len(rollouts)))
    cold = learner.policy_logprobs(plain_temperature, np.arange(len(rollouts)))
    differs = [not np.allclose(found[i], cold[i], atol=1e-2) for i in range(len(rollouts))]
    assert differs == [temperature != 1 for temperature in rollouts.temperatures]


def test_a_token_with_a_false_mask_is_read_but_not_learned(untied: Path) -> None:
    rollouts = permuted(make_rollouts(), np.array([1]))
    assert rollouts.masks[0].tolist()[:2] == [False, True]
    config = settings(kl_coefficient=0.0, old_logprobs="recomputed")
    _, found, stored = step_gradient(untied, config, rollouts)
    assert len(stored.policy[0]) == len(rollouts.responses[0]) - 1
    model = in_double(untied)
    (-rollouts.advantages[0] * one_logprobs(model, rollouts, 0).mean()).backward()
    assert deviation(found, gradients(model)) <= 1e-5
    every = replace(rollouts, masks=[np.ones_like(rollouts.masks[0])])
    _, other_gradient, _ = step_gradient(untied, config, every)
    assert deviation(other_gradient, found) > 0.1


# ---- nothing to learn from ----


def bytes_of(run: Run, iteration: int) -> dict[str, bytes]:
    """Policy and optimiser files of an update."""
    manifest = run.require("update", iteration, "")
    return {
        file.name: run.path_of(file, "update", iteration).read_bytes() for file in manifest.files if file.part
    }


@pytest.mark.parametrize("kept", [True, False])
def test_a_step_without_signal_leaves_everything_as_it_is(tmp_path: Path, tied: Path, kept: bool) -> None:
    config = configuration(kl_coefficient=0.0, learning_rate=0.01, weight_decay=0.1)
    run = make_run(tmp_path, config, tied, tied)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(tied), rollouts)))
    commit_rollouts(run, 0, rollouts)
    learner = Learner(config.update, "cpu")
    [row] = update(run, 0, learner)
    assert row["skipped"] is False
    before = bytes_of(run, 0)
    assert before["model.safetensors"] != (tied / "model.safetensors").read_bytes()

    if kept:
        commit_rollouts(run, 1, replace(rollouts, advantages=np.zeros(ROWS)))
    else:
        commit_rollouts(run, 1, permuted(rollouts, np.arange(0)), unkept=permuted(rollouts, np.arange(3)))
    [row] = update(run, 1, learner)
    expected = dict.fromkeys(tables.schema("updates").names)
    expected |= {"iteration": 1, "epoch": 0, "step": 0, "skipped": True, "learning_rate": 0.01}
    expected |= (
        {"rollouts": ROWS, "tokens": int(rollouts.num_tokens.sum())} if kept else {"rollouts": 0, "tokens": 0}
    )
    assert row == expected
    assert bytes_of(run, 1) == before
    assert len(run.read("logprobs", 1)) == 0


def test_only_the_steps_without_signal_are_skipped(tmp_path: Path, tied: Path) -> None:
    config = configuration(kl_coefficient=0.0, steps_per_iteration=5, learning_rate=0.01)
    run = make_run(tmp_path, config, tied, tied)
    rollouts = make_rollouts()
    silent = rollouts.keys[:, 1] % 2 == 1  # groups 1 and 3
    rollouts = replace(rollouts, advantages=np.where(silent, 0.0, rollouts.advantages))
    commit_rollouts(run, 0, rollouts)
    table = update(run, 0, Learner(config.update, "cpu"))
    steps = minibatches(rollouts.keys, 5, 0, 0, 0)
    assert [row["skipped"] for row in table] == [bool(rollouts.keys[rows[0], 1] % 2) for rows in steps]
    assert sum(row["skipped"] for row in table) == 2
    taken = [row["step"] for row in table if not row["skipped"]]
    assert [row["step"] for row in table if row["mismatch_mean"] is not None] == taken[:1]


def test_with_a_kl_term_advantages_of_zero_are_not_skipped(tmp_path: Path, untied: Path, other: Path) -> None:
    config = configuration(kl_coefficient=0.1)
    run = make_run(tmp_path, config, untied, other)
    commit_rollouts(run, 0, replace(make_rollouts(), advantages=np.zeros(ROWS)))
    [row] = update(run, 0, Learner(config.update, "cpu"))
    assert row["skipped"] is False
    assert row["policy_loss"] == 0
    assert row["loss"] == pytest.approx(0.1 * row["kl"], rel=1e-6)
    assert row["kl"] > 0
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("objective", ["dr_grpo", "dapo", "gspo", "cispo"])
def test_advantages_of_zero_take_no_forward_pass_but_count(untied: Path, objective: str) -> None:
    rollouts = make_rollouts()
    silent = np.isin(np.arange(ROWS), [0, 3, 4, 5, 6, 11])  # 3 of group 0, all of group 1 ...
    rollouts = replace(
        rollouts,
        advantages=np.where(silent, 0.0, rollouts.advantages),
        old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.2),
    )
    config = settings(objective, old_logprobs="sampled")
    row, found, stored = step_gradient(untied, config, rollouts)
    assert sorted(stored.policy) == sorted(stored.first_step) == np.flatnonzero(~silent).tolist()
    # Read with the others, they change nothing: their entropy is asked for, at a coefficient that rounds off.
    everything = config.model_copy(update={"entropy_coefficient": 1e-30})
    again, expected, all_of_them = step_gradient(untied, everything, rollouts)
    assert sorted(all_of_them.policy) == list(range(ROWS))
    assert deviation(found, expected) <= 1e-5
    assert row["policy_loss"] == pytest.approx(again["policy_loss"], rel=1e-5)
    # Left out of the step they would count in no denominator: 14 rollouts would be 8.
    signal = permuted(rollouts, np.flatnonzero(~silent))
    _, alone, _ = step_gradient(untied, config, signal)
    tokens = int(signal.num_tokens.sum()) / int(rollouts.num_tokens.sum())
    share = 8 / 14 if objective in ("dr_grpo", "gspo") else tokens
    assert deviation({name: g / share for name, g in found.items()}, alone) <= 1e-5


# ---- the learning rate ----


def with_iterations(config: Config, iterations: int) -> Config:
    return config.model_copy(update={"iterations": iterations})


def test_the_learning_rate_of_each_step_is_in_the_table(tmp_path: Path, untied: Path) -> None:
    keys: dict[str, Any] = {
        "schedule": "linear",
        "warmup_steps": 2,
        "learning_rate": 0.01,
        "steps_per_iteration": 3,
    }
    config = with_iterations(configuration(kl_coefficient=0.0, **keys), 2)
    run = make_run(tmp_path, config, untied, untied)
    learner = Learner(config.update, "cpu")
    found = []
    for iteration in range(2):
        commit_rollouts(run, iteration, make_rollouts())
        found += [row["learning_rate"] for row in update(run, iteration, learner)]
        assert learner.optimizer.param_groups[0]["lr"] == found[-1]
    # Up in two steps, then down by a quarter of 0.01 a step, so as to be 0 at the seventh.
    assert found == pytest.approx([0, 0.005, 0.01, 0.0075, 0.005, 0.0025], rel=1e-12)
    commit_rollouts(run, 2, make_rollouts())
    message = (
        r"^update\.schedule: linear reaches 0 after iterations: 2; found iteration 2; raise `iterations`, or"
        r" set schedule: constant$"
    )
    with pytest.raises(UsageError, match=message):
        update(run, 2, learner)


def test_the_first_step_of_a_warm_up_moves_no_weight(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0, warmup_steps=1, learning_rate=0.01, weight_decay=0.1)
    run = make_run(tmp_path, config, untied, untied)
    learner = Learner(config.update, "cpu")
    start = load(untied, torch.float32).state_dict()
    rates = []
    for iteration, moved in enumerate((False, True)):
        commit_rollouts(run, iteration, make_rollouts())
        [row] = update(run, iteration, learner)
        rates.append(row["learning_rate"])
        assert row["grad_norm"] > 0
        same = [torch.equal(tensor, start[name]) for name, tensor in learner.model.state_dict().items()]
        assert all(same) != moved
    assert rates == [0, 0.01]
    assert len(learner.optimizer.state) == len(list(learner.model.parameters()))  # moments from step 0 on


# ---- which layout ----


def save_mistral(folder: Path) -> Path:
    """Attention reaches back 8 tokens: make_rollouts() has sequences of up to 14."""
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        sliding_window=8,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = MistralForCausalLM
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
    learner = make_learner(save_mistral(tmp_path / "mistral"), settings())
    assert learner.check_layout(rollouts, (6, 8))["layout"] == "packed"
    learner = make_learner(tmp_path / "mistral", settings())
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
    for i, row in enumerate(all_logprobs(in_double(tmp_path / "mistral"), rollouts)):
        np.testing.assert_allclose(read[i], row, atol=5e-6)
    # Below the window nothing shows.
    learner = make_learner(tmp_path / "mistral", settings())
    learner.network.best = "shared"
    found = learner.check_layout(short, (3, 4))
    assert found["layout"] == "shared"
    assert found["policy_layout_difference"] <= 1e-5


# ---- shards of logprobs ----


def test_logprobs_in_several_shards_are_in_key_order(
    tmp_path: Path, untied: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = make_rollouts()
    config = configuration(steps_per_iteration=3, learning_rate=0.01)  # read in another order than stored
    shards, stored = [], []
    for name, num_rows in (("one", 2048), ("four", 4)):
        monkeypatch.setattr(stage, "_ROWS_PER_SHARD", num_rows)
        run = make_run(tmp_path / name, config, untied, other)
        commit_rollouts(run, 0, rollouts)
        update(run, 0, Learner(config.update, "cpu"))
        shards.append([len(shard) for shard in run.read_shards("logprobs", 0)])
        table = run.read("logprobs", 0)
        stored.append(table.to_pylist())
        keys = np.stack([table[key].to_numpy() for key in tables.KEY], axis=1)
        assert keys.tolist() == rollouts.keys.tolist()
    assert shards == [[14], [4, 4, 4, 2]]
    assert stored[0] == stored[1]
    assert {row["step"] for row in stored[0]} == {0, 1, 2}
    assert all(row["reference_logprobs"] is not None for row in stored[0])


# ---- what is not finite ----


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in learner.model.named_parameters()}


def expect_error(learner: Learner, rollouts: Rollouts, stored: Stored, message: str) -> None:
    weights = {name: p.clone() for name, p in weights_of(learner).items()}
    with pytest.raises(EngineError, match=message) as caught:
        learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), stored, 0)
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


def test_nothing_is_committed_after_an_error(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0)
    run = make_run(tmp_path, config, untied, untied)
    commit_rollouts(run, 0, make_rollouts())
    learner = make_learner(untied, config.update)
    with torch.no_grad():
        weights_of(learner)["model.embed_tokens.weight"][RARE] = math.nan
    with pytest.raises(EngineError, match=r"\(0, 1, 1\); nothing was committed$"):
        update(run, 0, learner)
    assert run.manifest("update", 0) is None
    assert learner.holds == (None, None)
    [row] = update(run, 0, learner)  # loaded again from disk
    assert row["skipped"] is False


# ---- checkpoints ----


def save(learner: Learner, start: Path, folder: Path) -> Path:
    (folder / "policy").mkdir(parents=True)
    for name, content in policy_files(learner.model, start):
        (folder / "policy" / name).write_bytes(b"".join(content))
    (folder / OPTIMIZER_FILE).write_bytes(b"".join(optimizer_file(learner.optimizer, learner.model)))
    return folder


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_stopping_and_going_on_gives_the_same_bytes(
    tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(model)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(start), rollouts)))
    config = settings(kl_coefficient=0.0, learning_rate=0.01, weight_decay=0.01, max_tokens_per_batch=50)

    def step(learner: Learner) -> None:
        learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored(), 0)

    through = make_learner(start, config)
    step(through)
    first = save(through, start, tmp_path / "first")
    step(through)
    never_stopped = save(through, start, tmp_path / "never")

    resumed = Learner(config, "cpu")
    resumed.load(first / "policy", first / OPTIMIZER_FILE, ("a", "b"))
    again = save(resumed, start, tmp_path / "again")
    step(resumed)
    stopped = save(resumed, start, tmp_path / "stopped")
    # A learner that goes back to the state in memory before is the same too.
    through.load(first / "policy", first / OPTIMIZER_FILE, ("a", "b"))
    step(through)
    rewound = save(through, start, tmp_path / "rewound")

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(again) == content(first)
    assert content(stopped) == content(never_stopped)
    assert content(rewound) == content(never_stopped)
    assert content(first)["model.safetensors"] != content(never_stopped)["model.safetensors"]
    assert content(first)[OPTIMIZER_FILE] != content(never_stopped)[OPTIMIZER_FILE]


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_checkpoint_is_one_of_hugging_face(
    tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(model)
    learner = make_learner(start, settings("grpo_sequence", kl_coefficient=0.0, learning_rate=0.01))
    rollouts = make_rollouts()
    learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored(), 0)
    folder = save(learner, start, tmp_path / "saved") / "policy"
    pair: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, report = pair
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    expected = learner.model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    embedding = loaded.get_input_embeddings().weight
    assert (embedding.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()) == (model == "tied")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, learner.model(ids).logits)
    before = load(start, torch.float32)
    assert not torch.equal(before.get_input_embeddings().weight, embedding)
    assert json.loads((folder / "config.json").read_text()) == json.loads((start / "config.json").read_text())


def test_optimiser_state_of_another_model_is_refused(tmp_path: Path, tied: Path, untied: Path) -> None:
    learner = make_learner(untied, settings(kl_coefficient=0.0))
    rollouts = make_rollouts()
    learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored(), 0)
    folder = save(learner, untied, tmp_path / "saved")
    fresh = Learner(settings(), "cpu")
    with pytest.raises(
        CorruptError, match=r"not the optimiser state of this model: see exp_avg\.lm_head\.weight"
    ):
        fresh.load(tied, folder / OPTIMIZER_FILE, ("a", "b"))
    assert fresh.holds == (None, None)


def test_a_learner_that_never_stepped_has_no_moments(tmp_path: Path, tied: Path) -> None:
    learner = make_learner(tied, settings())
    folder = save(learner, tied, tmp_path / "saved")
    fresh = Learner(settings(), "cpu")
    fresh.load(folder / "policy", folder / OPTIMIZER_FILE, ("a", "b"))
    assert not fresh.optimizer.state


# ---- gradient clipping ----


def test_the_gradient_is_scaled_down_to_the_given_norm(untied: Path) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    row, free, _ = step_gradient(untied, settings(kl_coefficient=0.0), rollouts)
    limit = row["grad_norm"] / 4
    clipped, found, _ = step_gradient(untied, settings(kl_coefficient=0.0, max_grad_norm=limit), rollouts)
    assert clipped["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-6)  # reported before clipping
    assert deviation({name: 4 * g for name, g in found.items()}, free) <= 1e-4


# ---- mismatch ----


def test_mismatch_by_hand() -> None:
    # d = ln 3, 0 | -ln 3, ln 1.5: w = 3, 1, 1/3, 1.5
    a, b = math.log(3), math.log(1.5)
    policy = [np.array([-1.0 + a, -2.0]), np.array([-2.0 - a, -1.0 + b])]
    old = [np.array([-1.0, -2.0]), np.array([-2.0, -1.0])]
    found = mismatch(zip(policy, old, strict=True))
    assert found == {
        "mismatch_mean": pytest.approx((2 * a + b) / 4),
        "mismatch_max": pytest.approx(a),
        "mismatch_kl": pytest.approx((2 - a + 0 + (1 / 3 - 1 + a) + 0.5 - b) / 4),  # mean of w - 1 - ln w
        # (35 / 6)^2 / (4 * (9 + 1 + 1 / 9 + 9 / 4)) = (1225 / 36) / (445 / 9) = 1225 / 1780
        "effective_sample_size": pytest.approx(1225 / 1780),
        "over_cap_fraction": 0.25,  # of 3, 1, 1/3 and 1.5 only 3 is over 2
    }
    assert mismatch(zip(policy, old, strict=True), cap=1.2)["over_cap_fraction"] == 0.5  # 3 and 1.5


def test_no_mismatch() -> None:
    same = [np.array([-1.0, -2.0], dtype=np.float32)]
    assert mismatch(zip(same, same, strict=True)) == {
        "mismatch_mean": 0,
        "mismatch_max": 0,
        "mismatch_kl": 0,
        "effective_sample_size": 1,
        "over_cap_fraction": 0,
    }


def test_mismatch_of_policies_with_nothing_in_common_is_finite() -> None:
    found = mismatch([(np.array([-1.0, -900.0, -1.0]), np.array([-900.0, -1.0, -1.0]))])
    assert all(math.isfinite(value) for value in found.values())
    assert found["effective_sample_size"] == pytest.approx(1 / 3)  # one weight outweighs all
    assert found["over_cap_fraction"] == pytest.approx(1 / 3)


def test_at_learning_rate_zero_the_mismatch_stays(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0, learning_rate=0.0, epochs=2, max_tokens_per_batch=1)
    run = make_run(tmp_path, config, untied, untied)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    commit_rollouts(run, 0, rollouts)
    table = update(run, 0, Learner(config.update, "cpu"))
    assert table[0]["mismatch_max"] < 1e-5
    assert table[0]["effective_sample_size"] == pytest.approx(1, abs=1e-9)
    assert [row["loss"] for row in table] == [table[0]["loss"]] * 2
    stored = run.read("logprobs", 0).to_pylist()
    assert len(stored) == ROWS - 1  # without a KL term, the rollout of advantage 0 is not read
    assert {row["step"] for row in stored} == {0}
    assert all(row["reference_logprobs"] is None for row in stored)
    kept = kept_rollouts(run.read_shards("rollouts", 0), run.read("advantages", 0), tmp_path)
    read = kept.num_tokens[kept.advantages != 0]
    assert read.tolist() == [len(row["policy_logprobs"]) for row in stored]
