"""transformers_engine: the built-in sampler, plain transformers and torch.

Different from `model.generate`: a prompt goes through the model once for its K samples, which share its keys
and values where the model's attention allows (prefix_attention.py); a row leaves the batch as it ends; each
sample draws from its own numbers, so its tokens do not depend on who shares its batch (up to float rounding);
and log-probs are recorded as tokens are drawn. A shard is sampled as a whole, in batches that its own
requests alone determine: the same shard gives the same bytes.

Shapes: P prompts, B samples of a batch, N samples still in the batch (N <= B), L prompt positions
(left-padded to the longest), T response tokens, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from grpo.errors import EngineError, UnsupportedModelError
from grpo.generate.engines.draw import draw, penalise, uniforms
from grpo.generate.engines.kv_cache import Move, cache_name, move_rows, new_cache
from grpo.generate.engines.prefix_attention import NAME, Prefix, prefix_attention, takes_prefix
from grpo.generate.engines.protocol import Group, OnProgress, Request, Sample, Sampling, check_requests
from grpo.generate.engines.stop import StopWatches
from grpo.generate.engines.tail import Tail
from grpo.models.attention import attending
from grpo.models.loading import Blueprint, context_length, eos_token_ids, has_tensors, load_model
from grpo.models.logprobs import token_logprobs
from grpo.models.tokenizer import tokenizer_at
from grpo.models.weights import Weights


class TransformersEngine:
    """max_rows_per_batch: samples decoded together, at least a group; it changes no more than rounding."""

    precision = "float32"

    def __init__(self, device: str, max_rows_per_batch: int, attention: str = "auto") -> None:
        self.device = device
        self.attention = attention  # as load_model takes it
        self.max_rows_per_batch = max_rows_per_batch
        self._model: PreTrainedModel | None = None
        # Over the learner's tensors: on a CPU it holds nothing of its own, and is taken again.
        self._shared: PreTrainedModel | None = None
        self._blueprint: Blueprint | None = None  # of the last model that was not of the one before
        self._takes_prefix = False
        self._eos_ids: frozenset[int] = frozenset()
        # The first one's, the starting policy: it stays, and the folders of later ones may be lent.
        self._tokenizer_folder: Path | None = None
        self.tail = Tail()

    def load(self, checkpoint: Path) -> None:
        """Build the model anew from `checkpoint`: nothing of an earlier one can stay behind.

        Raises what load_model does, and UnsupportedModelError for a model that cannot be batched here.
        """
        self.release()  # first: two policies need not fit into memory
        self._shared = None
        model = self._blueprint.load_model(checkpoint, self.device) if self._blueprint else None
        if model is None:
            model = load_model(checkpoint, self.device, self.attention)
            self._blueprint = Blueprint(model, checkpoint)
            self._look_at(model)
        self._model = model
        self._tokenizer_folder = self._tokenizer_folder or checkpoint
        self._eos_ids = eos_token_ids(checkpoint)

    def take(self, weights: Weights) -> None:
        """Compute with these tensors themselves, in modules of its own; with merged ones under an adapter.

        In modules of its own: what training leaves in those of the learner changes nothing here.
        """
        self.release()
        blueprint = self._blueprint
        if blueprint is None or not blueprint.is_of(weights.folder):
            built = weights.plain or load_model(weights.folder, self.device, self.attention)
            blueprint = Blueprint(built, weights.folder)
        tensors = {name: tensor.to(self.device) for name, tensor in weights.own()}
        model = self._shared
        if model is None or blueprint is not self._blueprint or not has_tensors(model, tensors):
            model = blueprint.holding(tensors)
        self._shared = model if self.device == "cpu" and weights.plain is not None else None
        if blueprint is not self._blueprint:
            self._blueprint = blueprint
            self._look_at(model)
        self._model = model
        self._tokenizer_folder = self._tokenizer_folder or weights.folder
        self._eos_ids = eos_token_ids(weights.folder)

    def _look_at(self, model: PreTrainedModel) -> None:
        """See what a model that is not like the one before can do. Raises UnsupportedModelError."""
        accepted = inspect.signature(model.forward).parameters
        for name in ("attention_mask", "position_ids", cache_name(model), "logits_to_keep"):
            if name not in accepted:
                message = f"{type(model).__name__} takes no {name}, which the transformers engine needs"
                raise UnsupportedModelError(f"generate: {message}")
        self._takes_prefix = takes_prefix(model)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs at temperature 1 of every token but the first, by the learner's formula."""
        assert self._model is not None, "load() or take() comes before logprobs()"
        return [score(self._model, sequence) for sequence in sequences]

    def sample(
        self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
    ) -> Iterator[Group]:
        """Yield each group once, batch after batch. Raises DataError, EngineError."""
        assert self._model is not None, "load() or take() comes before sample()"
        assert self._tokenizer_folder is not None
        if sampling.top_p < 1 or sampling.top_k is not None or sampling.min_p > 0:
            message = "the transformers engine samples from the whole distribution; top_p, top_k and min_p"
            raise EngineError(f"generate: {message} need engine: vllm")
        if sampling.structured_outputs is not None:
            raise EngineError("generate: structured_outputs need engine: vllm; the built-in engine has none")
        tokenizer = tokenizer_at(self._tokenizer_folder) if sampling.stop else None
        config = self._model.config
        vocabulary = config.get_text_config(decoder=True).vocab_size
        for shard in shards:
            check_requests(shard, sampling, vocabulary, context_length(config))
            for batch in plan_batches(shard, self.max_rows_per_batch):
                # A sample that has its prompt to itself shares nothing.
                shares = self._takes_prefix and min(len(request.seeds) for request in batch) > 1
                yield from sample_batch(
                    self._model, batch, sampling, self._eos_ids, on_progress, shares, self.tail, tokenizer
                )

    def release(self) -> None:
        """Drop the model, and hand what it took of a GPU's memory back to other users of it."""
        self._model = None
        torch.cuda.empty_cache()

    close = release


def plan_batches(requests: Sequence[Request], max_rows: int) -> list[list[Request]]:
    """Cut requests into batches of at most `max_rows` samples (or one group), neighbours in prompt length."""
    batches: list[list[Request]] = []
    num_rows = 0
    for request in sorted(requests, key=lambda request: len(request.prompt_token_ids)):  # stable
        num_rows += len(request.seeds)
        if not batches or num_rows > max_rows:
            batches.append([])
            num_rows = len(request.seeds)
        batches[-1].append(request)
    return batches


@torch.inference_mode()
def score(model: PreTrainedModel, sequence: Sequence[int]) -> np.ndarray:
    """Log-probs at temperature 1 of all tokens but the first, float32 [length - 1]."""
    tokens_L = torch.tensor(sequence, device=model.device)
    logits_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0]
    temperature_T = torch.ones(len(sequence) - 1, device=model.device)
    logprobs_T, _ = token_logprobs(logits_LV[:-1], tokens_L[1:], temperature_T)
    return logprobs_T.cpu().numpy()


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    eos_ids: frozenset[int],
    on_progress: OnProgress,
    shares_prompts: bool,
    tail: Tail,
    tokenizer: Tokenizer | None = None,
) -> list[Group]:
    """Sample all groups of one batch together, to their ends; `tail` is told how many are under way.

    shares_prompts: keep keys and values of a prompt once; needs takes_prefix(model). tokenizer: for stop.
    """
    rows = _Rows(model, requests, sampling, shares_prompts)
    watches = StopWatches(tokenizer, requests, sampling.stop)
    eos_E = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=model.device)
    # What was drawn; past num_tokens_B a row holds nothing of meaning.
    tokens_BT = torch.zeros(rows.uniforms_NT.shape, dtype=torch.int64, device=model.device)
    logprobs_BT = torch.zeros(tokens_BT.shape, device=model.device)
    num_tokens_B = tokens_BT.new_zeros(len(tokens_BT))
    with attending(model, NAME, prefix_attention) if shares_prompts else nullcontext():
        for step in range(sampling.max_new_tokens):
            with tail.at(len(rows.sample_N), len(tokens_BT)):
                tokens_N, logprobs_N = rows.draw(step, sampling.temperature)
                tokens_BT[rows.sample_N, step], logprobs_BT[rows.sample_N, step] = tokens_N, logprobs_N
                num_tokens_B[rows.sample_N] = step + 1
                ended_N = watches.ended(torch.isin(tokens_N, eos_E), rows.sample_N, tokens_N)
                left = 0 if step + 1 == sampling.max_new_tokens else int((~ended_N).sum())
                on_progress(len(tokens_N), len(tokens_N) - left)
                if not left:
                    break
                rows.advance(rows.leave(ended_N, tokens_N))
    tokens = _drawn(tokens_BT.to(torch.int32), num_tokens_B)
    logprobs = _drawn(logprobs_BT, num_tokens_B)
    samples = (
        Sample(tokens_T, logprobs_T, "stop" if stopped or tokens_T[-1] in eos_ids else "length")
        for tokens_T, logprobs_T, stopped in zip(tokens, logprobs, watches.stopped_B, strict=True)
    )
    return [Group(request.group_id, list(islice(samples, len(request.seeds)))) for request in requests]


def _drawn(values_BT: Tensor, num_tokens_B: Tensor) -> list[np.ndarray]:
    """Of each sample the values of the tokens that it has."""
    drawn_BT = torch.arange(values_BT.shape[1], device=values_BT.device) < num_tokens_B[:, None]
    return np.split(values_BT[drawn_BT].cpu().numpy(), num_tokens_B.cumsum(0)[:-1].tolist())


class _Rows:
    """The samples in the batch: where each stands, and what the model needs for its next token."""

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling, shares_prompts: bool
    ) -> None:
        """Put each prompt through the model once, then give each of its samples a row."""
        device, max_new_tokens = model.device, sampling.max_new_tokens
        prompts = [torch.tensor(request.prompt_token_ids) for request in requests]
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        tokens_PL = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
        width = tokens_PL.shape[1]
        # Responses never hold padding, hence the room: arange - width + length >= 0 is True there.
        position_PL = torch.arange(width + max_new_tokens, device=device) + (lengths_P - width)[:, None]
        visible_PL = position_PL >= 0 if bool((lengths_P < width).any()) else None
        mask_PL = None if visible_PL is None else visible_PL[:, :width]
        self.model, self.cache_name = model, cache_name(model)
        self.prefix: dict[str, Prefix] = {}  # the prompts, where the cache holds the responses alone
        self.cache = new_cache(model.config, max_new_tokens)
        logits_PV = self._logits(tokens_PL, mask_PL, position_PL[:, :width].clamp(min=0))
        samples = [(prompt, seed) for prompt, request in enumerate(requests) for seed in request.seeds]
        prompt_B = torch.tensor([prompt for prompt, _ in samples], device=device)
        if shares_prompts:
            cache, self.cache = self.cache, new_cache(model.config, max_new_tokens)
            self.prefix, visible_PL = {"prefix": Prefix(cache, self.cache, mask_PL, prompt_B)}, None
        else:
            self.cache.batch_select_indices(prompt_B)
        self.logits_NV = logits_PV[prompt_B]  # of the next token
        self.penalty = sampling.repetition_penalty
        self.seen_NV: Tensor | None = None  # tokens of prompt and response, where they are penalised
        if self.penalty != 1:
            seen_PV = torch.zeros_like(logits_PV, dtype=torch.bool)
            for seen_V, prompt_L in zip(seen_PV, prompts, strict=True):
                seen_V[prompt_L.to(device)] = True
            self.seen_NV = seen_PV[prompt_B]
        self.sample_N = torch.arange(len(samples), device=device)  # which of the B samples
        self.position_N = lengths_P[prompt_B]  # of the next token, padding not counted
        uniforms_BT = uniforms([seed for _, seed in samples], max_new_tokens)
        self.uniforms_NT = torch.from_numpy(uniforms_BT).to(device)
        # True where not padding, response room included; None: no padding.
        self.visible_NL = None if visible_PL is None else visible_PL[prompt_B]

    def draw(self, step: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability, as draw.draw() gives them."""
        if self.seen_NV is None:
            return draw(self.logits_NV, self.uniforms_NT[:, step], temperature)
        logits_NV = penalise(self.logits_NV, self.seen_NV, self.penalty)
        tokens_N, logprobs_N = draw(logits_NV, self.uniforms_NT[:, step], temperature)
        self.seen_NV.scatter_(1, tokens_N[:, None], True)
        return tokens_N, logprobs_N

    def leave(self, ended_N: Tensor, tokens_N: Tensor) -> Tensor:
        """Let samples that have ended leave. Returns the tokens of those that stay, in their new order."""
        move = Move.out(ended_N)
        if move.num_left == len(ended_N):
            return tokens_N
        move_rows(self.cache, move)
        for prefix in self.prefix.values():
            prefix.leave(move)
        self.sample_N, self.position_N = move.apply(self.sample_N), move.apply(self.position_N)
        self.uniforms_NT = move.apply(self.uniforms_NT)
        self.seen_NV = None if self.seen_NV is None else move.apply(self.seen_NV)
        self.visible_NL = None if self.visible_NL is None else move.apply(self.visible_NL)
        return move.apply(tokens_N)

    def advance(self, tokens_N: Tensor) -> None:
        """Put one token of each row through the model."""
        width = self.cache.get_seq_length() + 1
        mask_NL = None if self.visible_NL is None else self.visible_NL[:, :width]
        self.logits_NV = self._logits(tokens_N[:, None], mask_NL, self.position_N[:, None])
        self.position_N = self.position_N + 1

    def _logits(self, tokens: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Of the token after the last of each row, [rows, V]."""
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
            **self.prefix,
        ).logits[:, -1]
        return logits
