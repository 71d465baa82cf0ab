"""Every family that is named as supported, against plain transformers in eager attention.

That side has no code of the package in it: a check that compares the product with itself finds nothing.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.families import EAGER, TINY, VOCABULARY, write_checkpoint
from transformers import AutoModelForCausalLM

from grpo.config import UpdateConfig
from grpo.errors import InputError
from grpo.generate.engines.protocol import Request, Sample, Sampling
from grpo.generate.engines.transformers_engine import TransformersEngine
from grpo.generate.weight_sync import WeightSync
from grpo.models.attention import choose_attention
from grpo.models.families import FAMILIES
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import WeightCheck, check_sequences, measure
from grpo.update.batch import Rollouts
from grpo.update.learner import Learner

TEMPERATURE = 0.8
TOLERANCE = 2e-5  # nats, of one token
# Their code does not tell the mask where a packed rollout begins: the learner finds it, and reads each alone.
APART = {("falcon", "auto"), ("falcon", "off"), ("opt", "off")}


def plain(checkpoint: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def plain_logprobs(model: Any, prompt: list[int], response: list[int], temperature: float) -> np.ndarray:
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs[torch.arange(len(response)), ids[0, len(prompt) :]].numpy()


def sampled(checkpoint: Path, attention: str = "auto") -> list[tuple[list[int], Sample]]:
    """By the built-in engine: prompts of several lengths in one batch, several samples of each."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, VOCABULARY, length).tolist() for length in (11, 1, 4)]
    requests = [Request(n, prompt, [100 * n + s for s in range(3)]) for n, prompt in enumerate(prompts)]
    engine = TransformersEngine("cpu", 64, attention)
    engine.load(checkpoint)
    groups = engine.sample([requests], Sampling(TEMPERATURE, 14), lambda *_: None)
    return [(prompts[group.group_id], sample) for group in groups for sample in group.samples]


def learned(
    checkpoint: Path,
    taken: list[tuple[list[int], Sample]],
    sharing: str,
    attention: str = "auto",
    *,
    is_refused: bool = False,
) -> dict[int, np.ndarray]:
    """By the learner: all in one micro-batch."""
    groups = {tuple(prompt): number for number, (prompt, _) in enumerate(taken)}
    old = [sample.logprobs for _, sample in taken]
    rollouts = Rollouts(
        keys=np.array([(0, groups[tuple(prompt)], row) for row, (prompt, _) in enumerate(taken)]),
        prompts=[np.array(prompt) for prompt, _ in taken],
        responses=[sample.token_ids.astype(np.int64) for _, sample in taken],
        masks=[np.ones(len(logprobs), dtype=bool) for logprobs in old],
        old_logprobs=old,
        advantages=np.zeros(len(taken)),
        temperatures=np.full(len(taken), TEMPERATURE),
    )
    learner = Learner(UpdateConfig.model_validate({"prompt_sharing": sharing}), "cpu", 0, attention)
    learner.load(checkpoint, None, "start")
    # As the stage does it: a layout in which the model computes something else is left.
    layout = learner.check_layout(rollouts, (11, 14))
    assert ("policy_layout_refused" in layout) == is_refused, layout
    return learner.policy_logprobs(rollouts, np.arange(len(taken)))


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_learner_and_weight_check_compute_what_plain_transformers_does(
    family: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, family)
    model, taken = plain(checkpoint), sampled(checkpoint)
    right = [plain_logprobs(model, prompt, s.token_ids.tolist(), TEMPERATURE) for prompt, s in taken]
    for (_, sample), expected in zip(taken, right, strict=True):
        assert np.abs(sample.logprobs - expected).max() <= TOLERANCE
    for sharing in ("auto", "off"):
        found = learned(checkpoint, taken, sharing, is_refused=(family, sharing) in APART)
        for row, expected in enumerate(right):
            assert np.abs(found[row] - expected).max() <= TOLERANCE, sharing
    ours = load_model(checkpoint, "cpu")
    assert ours.config._attn_implementation == ("eager" if family in EAGER else "sdpa")
    [sequence] = check_sequences([prompt for prompt, _ in taken], None)
    [measured] = measure(Reader(ours), [sequence]).logprobs
    expected = plain_logprobs(model, sequence[:1], sequence[1:], 1.0)
    assert np.abs(np.array(measured) - expected).max() <= TOLERANCE
    # The engine follows other weights, and the check shows it.
    sync = WeightSync(TransformersEngine("cpu", 64), lambda *_: None)
    sync.open(checkpoint, WeightCheck([sequence], [measured]))


def test_attention_with_sinks_is_right_where_eager_is_asked_for(tmp_path: Path) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}
    checkpoint = write_checkpoint(tmp_path, "gpt_oss", changes)
    model, taken = plain(checkpoint), sampled(checkpoint, "eager")
    found = learned(checkpoint, taken, "auto", "eager", is_refused=True)
    for row, (prompt, sample) in enumerate(taken):
        right = plain_logprobs(model, prompt, sample.token_ids.tolist(), TEMPERATURE)
        assert np.abs(sample.logprobs - right).max() <= TOLERANCE
        assert np.abs(found[row] - right).max() <= TOLERANCE


def test_the_documentation_names_the_families_that_are_tested() -> None:
    assert list(TINY) == list(FAMILIES) == sorted(FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    named = re.search(r"<!-- families -->\n(.*?)\n<!-- -->", page, re.DOTALL)
    assert named is not None
    assert re.findall(r"`(\w+)`", named[1]) == list(FAMILIES)


def test_a_cap_that_shows_would_be_lost_under_sdpa(tmp_path: Path) -> None:
    """Or the test over the families would pass for what it is to find."""
    checkpoint = write_checkpoint(tmp_path, "gemma2")
    auto: Any = AutoModelForCausalLM
    dropped = auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokens = list(range(3, 20))
    apart = [plain_logprobs(model, tokens[:1], tokens[1:], 1.0) for model in (plain(checkpoint), dropped)]
    assert np.abs(apart[0] - apart[1]).max() > 0.1
    with pytest.raises(InputError, match="sdpa does not compute softcap, which gemma2 has; set it to eager"):
        choose_attention(dropped, "sdpa")
