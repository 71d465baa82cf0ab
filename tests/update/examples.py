"""examples: small real checkpoints and rollouts, and what the plain restatement makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests import restatement, tiny
from tests.restatement import Objective, Response
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from grpo.config import Config, UpdateConfig
from grpo.config import objectives as configured
from grpo.update.batch import Rollouts, Rows
from grpo.update.checkpoint import MOMENTS, moments_of, policy_files, safetensors_file
from grpo.update.given import Step
from grpo.update.layout import PROMPT, MicroBatch
from grpo.update.learner import Learner
from grpo.update.objective import Stored, needed, step_of

VOCAB, EOS, MAX_NEW_TOKENS = 50, 2, 8
RARE = 41  # a token that only one rollout holds
ROWS = 14  # of make_rollouts()
OPTIMIZER_FILE = f"{MOMENTS}.safetensors"
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


def save_layer_norm_checkpoint(folder: Path) -> Path:
    """A GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel
        model(config).save_pretrained(folder)
    return folder


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
    learner.load(checkpoint, None, "start")
    if double:
        learner.model.double()
    return learner


def save_learner(learner: Learner, start: Path, folder: Path) -> Path:
    (folder / "policy").mkdir(parents=True)
    for name, content in policy_files(learner.model, start):
        (folder / "policy" / name).write_bytes(b"".join(content))
    moments = safetensors_file(moments_of(learner.optimizer, learner.model))
    (folder / OPTIMIZER_FILE).write_bytes(b"".join(moments))
    return folder


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in learner.model.named_parameters()}


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


def all_entropies(model: Any, rollouts: Rollouts) -> list[np.ndarray]:
    with torch.no_grad():
        return [one_rollout(model, rollouts, i)[1].numpy() for i in range(len(rollouts))]


def as_old(logprobs: list[np.ndarray], noise: float = 0.0, seed: int = 9) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [(row + noise * draw.normal(size=len(row))).astype(np.float32) for row in logprobs]


def tree_mask(batch: MicroBatch) -> Tensor:
    """bool [S, 1, L, L], True where a query (third) sees a key (fourth): itself, its own past, its prompt."""
    tree, branch = batch.tree_SL, batch.branch_SL
    mask_SLL = tree.unsqueeze(2) == tree.unsqueeze(1)
    mask_SLL &= (branch.unsqueeze(1) == PROMPT) | (branch.unsqueeze(2) == branch.unsqueeze(1))
    return mask_SLL.tril_().unsqueeze(1)


def whole_step(rollouts: Rollouts, rows: np.ndarray | None = None) -> Step:
    rows = np.arange(len(rollouts)) if rows is None else rows
    return step_of(settings(), rollouts, rows, MAX_NEW_TOKENS, Stored())


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
    read = everything[needed(config, rollouts)]
    if config.top_entropy is not None:
        stored.entropy = learner.policy_entropies(rollouts, everything)[1]
    step = step_of(config, rollouts, everything, MAX_NEW_TOKENS, stored)
    row, logprobs = learner.step(rollouts, read, step, stored)
    stored.keep(logprobs, 0)
    return row, gradients(learner.model), stored


def plain(
    model: Any,
    rollouts: Rollouts,
    rows: np.ndarray,
    old: Rows | None,
    reference: list[np.ndarray],
    objective: Objective,
    entropies: list[np.ndarray] | None = None,
) -> restatement.Loss:
    """Loss of the plain restatement; puts its gradient into `model`. `old`, `entropies` None: its own."""
    read = [one_rollout(model, rollouts, i) for i in rows]
    values, own_entropies = (
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
            own_entropies[n] if entropies is None else [float(x) for x in entropies[i]],
            int(rollouts.keys[i, 1]),
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
        tau_positive=config.tau_positive,
        tau_negative=config.tau_negative,
        ratio_cap=config.ratio_cap,
        k_positive=config.k_positive,
        k_negative=config.k_negative,
        lambda_positive=config.lambda_positive,
        lambda_negative=config.lambda_negative,
        off_policy_mask=config.off_policy_mask,
        top_entropy=config.top_entropy,
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
    ("grpo", "sampled", {"off_policy_mask": 0.01}),
    ("dapo", "sampled", {"top_entropy": 0.3}),
    ("gspo", "recomputed", {"off_policy_mask": 0.01}),
    ("dapo", "recomputed", TRUNCATE | {"off_policy_mask": 0.01, "top_entropy": 0.5}),
    ("scalerl", "sampled", {"clip_high": 0.1, "off_policy_mask": 0.01, "top_entropy": 0.5}),
]
# These differ in the formula alone, which one step shows.
ONE_STEP: list[tuple[str, str, dict[str, Any]]] = [
    *CASES,
    ("sapo", "sampled", {"tau_negative": 3.0}),
    ("gmpo", "sampled", {"clip_low": 0.1, "clip_high": 0.1}),
    ("dppo", "sampled", {"clip_low": 0.005, "clip_high": 0.005, "ratio_cap": 1.1}),
    ("dppo", "sampled", {"surrogate": "dppo_kl", "clip_low": 0.001, "clip_high": 0.001}),
    ("vespo", "sampled", {"k_negative": 1.5}),
    ("scalerl", "sampled", {"clip_high": 0.1}),
    ("gmpo", "sampled", {"clip_low": 0.1, "clip_high": 0.1, "aggregate": "prompt_mean"}),
]
OBJECTIVES = list(configured.OBJECTIVES)
CORRECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("grpo", TRUNCATE),
    ("grpo", MASK),
    ("grpo", TRUNCATE | BY_ROLLOUT),
    ("grpo", MASK | BY_ROLLOUT),
    ("grpo_sequence", TRUNCATE | BY_ROLLOUT),
    ("grpo_sequence", MASK | BY_ROLLOUT),
]
