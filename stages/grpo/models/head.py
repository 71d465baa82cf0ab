"""head: hidden states -> log-probability and entropy of chosen tokens, with no [N, V] tensor in memory.

One chunk of the vocabulary at a time: the forward keeps a running softmax of each token (Milakov and
Gimelshein 2018, arXiv:1805.02867), the backward computes each chunk's logits again. Not chunks of the tokens:
a chunk's rows of the weight gradient are complete after one product, and what is added to again and again is
the gradient of the hidden states, which is far smaller.

Shapes: N positions (any mixture of rows and tokens), D width of a hidden state, V vocabulary, C its chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.models.logprobs import token_logprobs

# Small beside the head's own weight and gradient (0.5 GB each at V = 151,936, D = 896), and wide enough at 8k
# tokens (C = 2,048) for products at full speed: benchmarks/head.txt.
CHUNK_BYTES = 2**26
# Wider on a GPU: 2,048 columns are 75 rounds of small kernels there.
CUDA_CHUNK_BYTES = 2**29
# Stands for a log-prob of -inf beside its probability: exp() of it is 0 in every type, and times 0 it is 0.
_NEVER = -1e4


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: x = scale * (hidden @ weight.T + bias), or softcap * tanh(x / softcap)."""

    weight_VD: Tensor  # the output embedding's parameter itself, tied to the input embedding or not
    bias_V: Tensor | None = None
    scale: float = 1.0  # > 0
    softcap: float | None = None  # > 0: no logit is larger in absolute value; None: no bound


def head_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """Logits [..., V] of hidden states [..., D], in the type of these; not under autocast."""
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD)
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    if head.scale != 1:
        logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = torch.tanh(logits_NV / head.softcap) * head.softcap
    return logits_NV


def head_logprobs(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature_N: Tensor,
    *,
    with_entropy: bool,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What token_logprobs(head_logits(hidden_ND, head), ...) gives, to rounding, in value and gradient.

    float32, or float64 where the hidden states are; under autocast products are of values in its type, added
    up in float32 as all else is: a logit of 16 in bfloat16 is 0.06 off. An entropy that no loss uses costs
    the backward nothing. chunk_bytes: size of an [N, C] tensor, by default CHUNK_BYTES, on a GPU
    CUDA_CHUNK_BYTES; up to three are alive at once. Without autocast, logits that fit into one chunk are kept
    instead of computed twice.
    """
    num_tokens, width = hidden_ND.shape
    device, product_dtype = hidden_ND.device.type, hidden_ND.dtype
    if torch.is_autocast_enabled(device) and product_dtype != torch.float64:
        product_dtype = torch.get_autocast_dtype(device)
    dtype = torch.promote_types(product_dtype, torch.float32)
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES
    # Not narrower than D: the hidden states are as large, and narrow products are slow.
    chunk = max(chunk_bytes // (max(num_tokens, 1) * dtype.itemsize), width)
    if chunk >= len(head.weight_VD) and product_dtype == dtype:
        logits_NV = head_logits(hidden_ND, head)
        return token_logprobs(logits_NV, targets_N, temperature_N, with_entropy=with_entropy)
    logits_of = partial(_Logits, head.scale, head.softcap, product_dtype, chunk)
    inputs = (hidden_ND, head.weight_VD, head.bias_V, targets_N, temperature_N.to(dtype))
    results: tuple[Tensor, Tensor | None] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        logits_of, with_entropy, *inputs
    )
    return results


class _Logits:
    """The logits of one pass over the vocabulary, by chunks that share their memory."""

    def __init__(
        self, scale: float, softcap: float | None, product_dtype: torch.dtype, chunk: int, *inputs: Any
    ) -> None:
        hidden_ND, self.weight_VD, self.bias_V, self.targets_N, temperature_N = inputs
        self.product_dtype, self.dtype = product_dtype, temperature_N.dtype
        self.chunk, self.has_cap = chunk, softcap is not None
        # A logit over its temperature, z, is inner * (h @ W.T + b), and with a cap outer * tanh(that).
        if softcap is None:
            self.inner_N = scale / temperature_N
            self.outer_N = torch.ones_like(temperature_N)
        else:
            self.inner_N = torch.full_like(temperature_N, scale / softcap)
            self.outer_N = softcap / temperature_N
        # One factor per row of the hidden states is one per row of the product, for a fraction of the work;
        # but in a narrower type it would be rounded away.
        self.is_narrow = product_dtype != self.dtype
        self.hidden_ND = hidden_ND.to(product_dtype) if self.is_narrow else hidden_ND * self.inner_N[:, None]
        self._memory: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns, weight_CD in the products' type, inner * (h @ W.T + b) in memory of the next chunk)."""
        for start in range(0, len(self.weight_VD), self.chunk):
            columns = slice(start, min(start + self.chunk, len(self.weight_VD)))
            weight_CD = self.weight_VD[columns].to(self.product_dtype)
            logits_NC = _product(self.hidden_ND, weight_CD.t(), self.memory("logits", columns))
            if self.is_narrow:
                logits_NC.mul_(self.inner_N[:, None])
            if self.bias_V is not None:
                logits_NC.addcmul_(self.inner_N[:, None], self.bias_V[columns].to(self.dtype))
            yield columns, weight_CD, logits_NC

    def memory(self, name: str, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
        """[N, C] not set to anything; the same memory for the same name."""
        num_tokens, num_columns = len(self.hidden_ND), columns.stop - columns.start
        if name not in self._memory:
            size = num_tokens * self.chunk
            self._memory[name] = self.hidden_ND.new_empty(size, dtype=dtype or self.dtype)
        return self._memory[name][: num_tokens * num_columns].view(num_tokens, num_columns)

    def targets(self, columns: slice) -> tuple[Tensor, Tensor]:
        """(whether a token's target is among the columns, bool; its place there [N, 1], 0 for any other)."""
        inside_N = (self.targets_N >= columns.start) & (self.targets_N < columns.stop)
        return inside_N, ((self.targets_N - columns.start) * inside_N)[:, None]


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probs and entropy [N]. Autocast leaves alone what is in place, into `out` or of types cast here."""

    @staticmethod
    def forward(
        ctx: Any, logits_of: Callable[..., _Logits], with_entropy: bool, *inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(*inputs)
        # Finite, because -inf - -inf is NaN. total: sum exp(z - top); weighted: sum (z - top) exp(z - top).
        top_N = torch.full_like(logits.inner_N, torch.finfo(logits.dtype).min)
        total_N, weighted_N, target_N = (torch.zeros_like(top_N) for _ in range(3))
        for columns, _, z_NC in logits.chunks():
            if logits.has_cap:
                z_NC.tanh_().mul_(logits.outer_N[:, None])
            inside_N, place_N1 = logits.targets(columns)
            target_N = torch.where(inside_N, z_NC.gather(1, place_N1)[:, 0], target_N)
            before_N, top_N = top_N, torch.maximum(top_N, z_NC.amax(dim=1))
            shift_N = (before_N - top_N).clamp_min_(_NEVER)
            z_NC.sub_(top_N[:, None])
            p_NC = torch.exp(z_NC, out=logits.memory("p", columns) if with_entropy else z_NC)
            if with_entropy:
                weighted_N = shift_N.exp() * (weighted_N + shift_N * total_N)
                weighted_N += z_NC.clamp_min_(_NEVER).mul_(p_NC).sum(dim=1)
            total_N = shift_N.exp() * total_N + p_NC.sum(dim=1)
        entropy_N = total_N.log() - weighted_N / total_N if with_entropy else None
        ctx.save_for_backward(*inputs, top_N + total_N.log(), entropy_N)
        ctx.logits_of = logits_of
        ctx.set_materialize_grads(False)  # None, not zeros, for an entropy that no loss uses
        return target_N - top_N - total_N.log(), entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, logsumexp_N, entropy_N = ctx.saved_tensors
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(logsumexp_N)
        logits = ctx.logits_of(*inputs)
        wanted = zip(inputs, ctx.needs_input_grad[2:5], strict=False)
        grads = [torch.zeros_like(x, dtype=logits.dtype) if wants else None for x, wants in wanted]
        grad_hidden_ND, grad_weight_VD, grad_bias_V = grads
        for columns, weight_CD, logits_NC in logits.chunks():
            z_NC = logits_NC
            if logits.has_cap:
                z_NC = torch.mul(logits_NC.tanh_(), logits.outer_N[:, None], out=logits.memory("z", columns))
            logprobs_NC = z_NC.sub_(logsumexp_N[:, None])
            # d logprob / dz_j = [j = target] - p_j and d entropy / dz_j = -p_j (log p_j + entropy).
            if grad_entropy_N is None:
                grad_NC = logprobs_NC.exp_().mul_(-grad_logprobs_N[:, None])
            else:
                p_NC = torch.exp(logprobs_NC, out=logits.memory("p", columns))
                constant_N = grad_logprobs_N + grad_entropy_N * entropy_N
                grad_NC = logprobs_NC.clamp_min_(_NEVER).mul_(-grad_entropy_N[:, None])
                grad_NC.sub_(constant_N[:, None]).mul_(p_NC)
            inside_N, place_N1 = logits.targets(columns)
            grad_NC.scatter_add_(1, place_N1, (grad_logprobs_N * inside_N)[:, None])
            if logits.has_cap:  # d tanh(u) / du = 1 - tanh(u) ** 2
                grad_NC.mul_(logits_NC.square_().neg_().add_(1)).mul_(logits.outer_N[:, None])
            if grad_bias_V is not None:
                torch.mv(grad_NC.t(), logits.inner_N, out=grad_bias_V[columns])
            if logits.is_narrow:
                grad_NC.mul_(logits.inner_N[:, None])
                grad_NC = logits.memory("narrow", columns, logits.product_dtype).copy_(grad_NC)
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD[columns], grad_NC.t(), logits.hidden_ND)
            if grad_hidden_ND is not None:
                _add_product(grad_hidden_ND, grad_NC, weight_CD)
        if grad_hidden_ND is not None and not logits.is_narrow:
            grad_hidden_ND.mul_(logits.inner_N[:, None])
        return None, None, grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None


def _add_product(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """sum_ += left @ right, where the sum may be of a wider type."""
    if sum_.dtype == left.dtype:
        sum_.addmm_(left, right)
    else:
        sum_.add_(_product(left, right, torch.empty_like(sum_)))


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`, and in its type where that is wider than theirs."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
