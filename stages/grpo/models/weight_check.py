"""weight_check: a sequence of a run's own tokens, and the log-probs a policy gives them.

Every policy has one, beside the update that made it, computed by the learner. An engine that took
the weights scores the same tokens, for all policies of a run: a digest of parameters proves nothing, since
engines keep copies of them in other layouts. One pass meets every dense weight and the whole head.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from grpo.artifacts import read_json
from grpo.errors import CorruptError
from grpo.models.attention import vocabulary
from grpo.models.loading import best_device, context_length, load_model, load_tokenizer
from grpo.models.reader import Reader
from grpo.prompts.chat import Chat
from grpo.prompts.rendering import encode
from grpo.prompts.source import Row

FILE = "weight_check.json"
LENGTH = 32  # tokens of the sequence: a forward pass that costs nothing beside an update
NUM_PROMPTS = LENGTH  # enough, were each a single token
# Nats per token, mean; measured 1e-7 to 1e-6 for what is right, 0.01 and more for stale.
FLOAT32_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 3.0  # other precisions: times the disagreement on the freshly loaded starting policy
# Relative change of every weight in a perturbed copy: moves log-probs by 0.1 and more, above any tolerance.
PERTURBATION = 0.1
# Noise that is drawn, and used again and again. A prime: the rows of a weight, no multiple of it, get others.
_NUM_NOISE = 65_537


@dataclass(frozen=True)
class WeightCheck:
    """Example: sequences [[51, 43, 52]], logprobs [[-2.3, -0.7]]."""

    sequences: list[list[int]]  # of token ids
    logprobs: list[list[float]]  # of each token but the first, at temperature 1

    def encode(self) -> bytes:
        """As JSON; the numbers keep their bits."""
        return json.dumps(asdict(self), allow_nan=False).encode()

    def is_finite(self) -> bool:
        """Whether every log-prob is a number, which encode() needs."""
        return all(bool(np.isfinite(row).all()) for row in self.logprobs)

    def first(self, num_tokens: int) -> "WeightCheck":
        """Of the beginning of each sequence alone."""
        return WeightCheck(
            [row[:num_tokens] for row in self.sequences], [row[: num_tokens - 1] for row in self.logprobs]
        )

    def difference(self, logprobs: Sequence[np.ndarray]) -> float:
        """Mean |difference| per token, in nats, to what another computed for the same sequences."""
        own = np.concatenate([np.asarray(row, dtype=np.float64) for row in self.logprobs])
        return float(np.abs(own - np.concatenate(logprobs)).mean())


def read_weight_check(path: Path) -> WeightCheck:
    """The weight check in `path`. Raises CorruptError (exit 6) when it is none."""
    data = read_json(path, sequences=list, logprobs=list)
    return WeightCheck(data["sequences"], data["logprobs"])


def check_sequences(prompts: Iterable[Sequence[int]], context: int | None) -> list[list[int]]:
    """One sequence of LENGTH tokens: the prompts' behind each other, begun again where they end.

    context: the most positions the model has. One is left: engines score a prompt by sampling behind it.
    """
    length = LENGTH if context is None else min(LENGTH, context - 1)
    return [list(islice(cycle(int(token) for prompt in prompts for token in prompt), length))]


def weight_check_of(checkpoint: Path, rows: list[Row], chat: Chat, attention: str = "auto") -> WeightCheck:
    """The weight check of a starting policy: of the prompts `rows`, the first NUM_PROMPTS of a run.

    Raises CorruptError (exit 6) where finite weights give log-probs that are not.
    """
    device = best_device()
    reader = Reader(load_model(checkpoint, device, attention))
    sequences = check_sequences(
        encode(rows, load_tokenizer(checkpoint), chat)[1], context_length(reader.model.config)
    )
    most, size = max(chain.from_iterable(sequences), default=0), vocabulary(reader.model)
    if most >= size:
        raise CorruptError(
            f"{checkpoint}: its tokenizer gives token {most}; its model knows those below {size}"
        )
    found = measure(reader, sequences)
    del reader
    torch.cuda.empty_cache()  # the engine asks for most of it
    if not found.is_finite():
        message = "its log-probs are not finite, though its weights are: too large for float32"
        raise CorruptError(f"{checkpoint}: {message}")
    return found


def measure(reader: Reader, sequences: list[list[int]]) -> WeightCheck:
    """Measure a model, which may be in training: nothing of it changes. All sequences have one length."""
    input_ids_BL = torch.tensor(sequences, device=reader.model.device)
    targets_N = input_ids_BL[:, 1:].flatten()
    places_BL = torch.arange(input_ids_BL.numel(), device=input_ids_BL.device).view_as(input_ids_BL)
    with torch.no_grad():  # in inference mode sharded weights would be gathered for no other use
        inputs = {"input_ids": input_ids_BL, "use_cache": False}
        logprobs_N, _ = reader(inputs, places_BL[:, :-1].flatten(), targets_N, torch.ones_like(targets_N))
    return WeightCheck(sequences, logprobs_N.reshape(len(sequences), -1).tolist())


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Change every weight of a model in float32 in place, by noise of PERTURBATION times itself.

    What is finite stays so: a weight too large for that is the largest there is.
    """
    generator, largest = torch.Generator().manual_seed(0), torch.finfo(torch.float32).max
    noise_N = 1 + PERTURBATION * torch.randn(_NUM_NOISE, generator=generator)
    for parameter in model.parameters():
        factors_N = noise_N.to(parameter.device)
        for part_N in torch.split(parameter.view(-1), _NUM_NOISE):
            part_N.mul_(factors_N[: len(part_N)]).clamp_(-largest, largest)
