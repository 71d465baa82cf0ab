"""transformers_engine: the built-in sampler, plain transformers and torch.

Deliberately different from `model.generate`: a prompt goes through the model once for its K samples; rows
that have ended leave the batch; each sample draws from its own numbers, so its tokens do not depend on
who shares its batch (up to float rounding); and the log-probability of a token is recorded as it is drawn.
A shard is sampled as a whole, in batches that its own requests alone determine: the same shard gives the
same bytes.

Shapes: P prompts, B samples of a batch, N samples still in the batch (N <= B), L prompt positions
(left-padded to the longest), T response tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo.errors import DataError, EngineError
from grpo.generate.draw import draw
from grpo.generate.engine import Group, Request, Sample, Sampling, uniforms
from grpo.generate.kv_cache import new_cache
from grpo.model import context_length, eos_token_ids, load_model

# Rows that have ended leave the batch when at most this share still runs: each copy of the cache then
# drops a quarter of it, so all copies together cost less than four times the first cache.
COMPACT_SHARE = 0.75


class TransformersEngine:
    """The Engine of engine.py on one device. `max_rows_per_batch` bounds memory: samples decoded together.

    A group stays in one batch, so a batch is larger where a group is. Results depend on this number only by
    float rounding.
    """

    def __init__(self, device: str, max_rows_per_batch: int) -> None:
        self.device = device
        self.max_rows_per_batch = max_rows_per_batch
        self._model: PreTrainedModel | None = None
        self._eos_ids: frozenset[int] = frozenset()

    def load(self, checkpoint: Path) -> None:
        """Build the model anew from `checkpoint`: nothing of an earlier one can stay behind.

        Raises what load_model does, and EngineError for a model whose forward pass cannot be batched here.
        """
        self.close()  # first: two policies need not fit into memory
        model = load_model(checkpoint, self.device)
        _check_forward(model)
        self._eos_ids = eos_token_ids(checkpoint)
        self._model = model

    def sample(
        self,
        shards: Sequence[Sequence[Request]],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[Group]:
        """Yield each group once, batch after batch. Raises DataError, EngineError."""
        assert self._model is not None, "load() comes before sample()"
        for shard in shards:
            _check_requests(self._model, shard, sampling)
            for batch in plan_batches(shard, self.max_rows_per_batch):
                yield from sample_batch(self._model, batch, sampling, self._eos_ids, on_tokens)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


def plan_batches(requests: Sequence[Request], max_rows: int) -> list[list[Request]]:
    """Cut requests into batches of at most `max_rows` samples (or one group), neighbours in prompt length."""
    by_length = sorted(requests, key=lambda request: len(request.prompt_token_ids))  # stable
    batches: list[list[Request]] = []
    num_rows = 0
    for request in by_length:
        num_rows += len(request.seeds)
        if not batches or num_rows > max_rows:
            batches.append([])
            num_rows = len(request.seeds)
        batches[-1].append(request)
    return batches


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    eos_ids: frozenset[int],
    on_tokens: Callable[[int], None],
) -> list[Group]:
    """Sample all groups of one batch together, to their ends."""
    rows = _prefill(model, requests, sampling.max_new_tokens)
    eos_E = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=model.device)
    record = _Record.empty(len(rows.sample_N), sampling.max_new_tokens, model.device)
    for step in range(sampling.max_new_tokens):
        tokens_N, logprobs_N = draw(rows.logits_NV, rows.uniforms_NT[:, step], sampling.temperature)
        record.tokens_BT[rows.sample_N, step] = tokens_N
        record.logprobs_BT[rows.sample_N, step] = logprobs_N
        record.num_tokens_B[rows.sample_N] += rows.running_N
        num_drawn = rows.num_running
        rows.running_N &= ~torch.isin(tokens_N, eos_E)
        rows.num_running = int(rows.running_N.sum())
        on_tokens(num_drawn)
        if rows.num_running == 0 or step + 1 == sampling.max_new_tokens:
            break
        if rows.num_running <= COMPACT_SHARE * len(tokens_N):
            tokens_N = tokens_N[rows.running_N]
            rows.compact()
        rows.advance(model, tokens_N)
    return record.groups(requests, eos_ids)


@dataclass
class _Rows:
    """The samples in the batch: where each stands, and what the model needs for its next token."""

    logits_NV: Tensor  # of the next token
    cache: DynamicCache
    sample_N: Tensor  # int64, which of the B samples
    running_N: Tensor  # bool, True until an end-of-sequence token
    num_running: int
    position_N: Tensor  # int64, of the next token, padding not counted
    uniforms_NT: Tensor  # float64
    visible_NL: Tensor | None  # bool, True where not padding, response room included; None: no padding

    def compact(self) -> None:
        """Let the samples that have ended leave."""
        kept = self.running_N.nonzero().squeeze(-1)
        self.cache.batch_select_indices(kept)
        self.sample_N, self.running_N = self.sample_N[kept], self.running_N[kept]
        self.position_N, self.uniforms_NT = self.position_N[kept], self.uniforms_NT[kept]
        self.visible_NL = None if self.visible_NL is None else self.visible_NL[kept]

    def advance(self, model: PreTrainedModel, tokens_N: Tensor) -> None:
        """Put one token of each row through the model."""
        width = self.cache.get_seq_length() + 1
        self.logits_NV = model(
            input_ids=tokens_N.unsqueeze(-1),
            attention_mask=None if self.visible_NL is None else self.visible_NL[:, :width],
            position_ids=self.position_N.unsqueeze(-1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.position_N = self.position_N + 1


def _prefill(model: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int) -> _Rows:
    """Put each prompt through the model once, then give each of its samples a row."""
    device = model.device
    lengths_P = torch.tensor([len(request.prompt_token_ids) for request in requests], device=device)
    width = int(lengths_P.max())
    padded = [[0] * (width - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests]
    # Responses never hold padding, hence the room: arange - width + length >= 0 is True there.
    position_PL = torch.arange(width + max_new_tokens, device=device) + (lengths_P - width).unsqueeze(-1)
    visible_PL = position_PL >= 0 if bool((lengths_P < width).any()) else None
    cache = new_cache(model.config, max_new_tokens)
    logits_PV = model(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=None if visible_PL is None else visible_PL[:, :width],
        position_ids=position_PL[:, :width].clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    samples = [(prompt, seed) for prompt, request in enumerate(requests) for seed in request.seeds]
    prompt_B = torch.tensor([prompt for prompt, _ in samples], device=device)
    cache.batch_select_indices(prompt_B)
    return _Rows(
        logits_NV=logits_PV[prompt_B],
        cache=cache,
        sample_N=torch.arange(len(samples), device=device),
        running_N=torch.ones(len(samples), dtype=torch.bool, device=device),
        num_running=len(samples),
        position_N=lengths_P[prompt_B],
        uniforms_NT=torch.from_numpy(np.stack([uniforms(s, max_new_tokens) for _, s in samples])).to(device),
        visible_NL=None if visible_PL is None else visible_PL[prompt_B],
    )


@dataclass(frozen=True)
class _Record:
    """What was drawn; past num_tokens_B a row holds nothing of meaning."""

    tokens_BT: Tensor
    logprobs_BT: Tensor
    num_tokens_B: Tensor

    @classmethod
    def empty(cls, num_samples: int, max_new_tokens: int, device: torch.device) -> "_Record":
        shape = (num_samples, max_new_tokens)
        return cls(
            tokens_BT=torch.zeros(shape, dtype=torch.int64, device=device),
            logprobs_BT=torch.zeros(shape, dtype=torch.float32, device=device),
            num_tokens_B=torch.zeros(num_samples, dtype=torch.int64, device=device),
        )

    def groups(self, requests: Sequence[Request], eos_ids: frozenset[int]) -> list[Group]:
        tokens_BT = self.tokens_BT.to("cpu", torch.int32).numpy()
        logprobs_BT, num_tokens_B = self.logprobs_BT.cpu().numpy(), self.num_tokens_B.cpu().numpy()
        samples = [
            Sample(
                token_ids=tokens_T[:num_tokens].copy(),  # a view would keep the whole batch alive
                logprobs=logprobs_T[:num_tokens].copy(),
                finish_reason="stop" if int(tokens_T[num_tokens - 1]) in eos_ids else "length",
            )
            for tokens_T, logprobs_T, num_tokens in zip(tokens_BT, logprobs_BT, num_tokens_B, strict=True)
        ]
        ends = accumulate(len(request.seeds) for request in requests)
        return [
            Group(request.group_id, samples[end - len(request.seeds) : end])
            for request, end in zip(requests, ends, strict=True)
        ]


def _check_forward(model: PreTrainedModel) -> None:
    accepted = inspect.signature(model.forward).parameters
    for name in ("attention_mask", "position_ids", "past_key_values", "logits_to_keep"):
        if name not in accepted:
            message = f"{type(model).__name__} takes no {name}, which the transformers engine needs"
            raise EngineError(f"generate: {message}")
    new_cache(model.config, max_new_tokens=1)


def _check_requests(model: PreTrainedModel, shard: Sequence[Request], sampling: Sampling) -> None:
    """A token or a position the model does not have would be an IndexError, or worse on a GPU."""
    room, vocabulary = context_length(model.config), model.config.get_text_config(decoder=True).vocab_size
    for request in shard:
        where, length = f"generate: group {request.group_id}", len(request.prompt_token_ids)
        if length == 0:
            raise DataError(f"{where}: the prompt has no tokens; at least one is needed")
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocabulary:
            raise DataError(f"{where}: prompt token outside the model's vocabulary of {vocabulary}")
        if room is not None and length + sampling.max_new_tokens > room:
            need = f"{length} prompt tokens + max_new_tokens {sampling.max_new_tokens}"
            raise DataError(f"{where}: {need} do not fit the model's context of {room}")
