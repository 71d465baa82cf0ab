"""reader: a causal language model -> log-probs of chosen tokens, in one module's forward.

Weights that are sharded over processes are whole only while the module that holds them is called: so the
output head is used in the same call as the trunk, and nothing else calls the model for its log-probs.

Shapes: S sequences, L tokens of the longest, N positions that are asked for, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.models.head import Head, head_logits, head_logprobs
from grpo.models.logprobs import token_logprobs

# What configurations call a factor of the logits (Granite divides by it, HyperCLOVA X multiplies), and a cap.
_SCALE_KEYS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_PROOF_TOKENS = 8
# A cap of 30 does not show in the logits of a random model, and leaves no doubt in logits of this size.
_PROOF_LOGIT = 100.0
_PROOF_TOLERANCE = 1e-4
T = TypeVar("T")


class Reader(nn.Module):
    """`model` and its head; nothing is copied. The model is in eval mode, in float32 or float64.

    few: all logits at once, which needs no proof of a head: less for whoever reads a few tokens once.
    """

    def __init__(self, model: PreTrainedModel, *, few: bool = False) -> None:
        super().__init__()
        self.model = model
        # Not the head itself: sharding replaces its parameters.
        self.form = None if few else form_of(model)

    def ask(self, question: Callable[[PreTrainedModel], T]) -> T:
        """What `question` finds of the model, which may compute for it, without gradients."""
        with torch.no_grad():
            return question(self.model)

    def forward(
        self,
        inputs: Mapping[str, Any],
        places_N: Tensor,
        targets_N: Tensor,
        temperature_N: Tensor,
        *,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and, when asked for, entropies in nats of targets_N, [N] each, as of head_logprobs.

        inputs: arguments of the model's forward. places_N: where, in [S * L], the hidden states are that
        predict targets_N. All logits are made at once where split_head finds no head.
        """
        if self.form is None:
            logits_NV = self.model(**inputs).logits.flatten(0, 1)[places_N]
            return token_logprobs(logits_NV, targets_N, temperature_N, with_entropy=with_entropy)
        hidden_SLD = self.model.get_decoder()(**inputs).last_hidden_state  # type: ignore[no-untyped-call]
        linear = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head_logprobs(
            hidden_SLD.flatten(0, 1)[places_N],
            Head(linear.weight, linear.bias, *self.form),
            targets_N,
            temperature_N,
            with_entropy=with_entropy,
        )


def move(model: PreTrainedModel, device: str) -> None:
    """Its tensors to `device`, in place. torch's own: transformers wraps it for quantised models, untyped."""
    nn.Module.to(model, device)


def form_of(model: PreTrainedModel) -> tuple[float, float | None] | None:
    """Scale and cap of its head; None where split_head finds none."""
    split = split_head(model)
    return None if split is None else (split[1].scale, split[1].softcap)


def split_head(model: PreTrainedModel) -> tuple[PreTrainedModel, Head] | None:
    """The trunk of a causal language model, whose last_hidden_state the head reads, and that head.

    Proven on a few tokens: the model's own logits are the head's on what the trunk gives, for hidden states
    as they are and for such with logits of 100. None where nothing known here does that: then only the
    model's own logits are right. Needs a model in eval mode, in float32 or float64, outside autocast.
    """
    assert not model.training
    trunk, linear = model.get_decoder(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # Not a subclass: an adapter computes the same until it has learned something.
    if not isinstance(trunk, PreTrainedModel) or trunk is model or type(linear) is not torch.nn.Linear:
        return None
    text = model.config.get_text_config(decoder=True)
    given = [value for key in _SCALE_KEYS if (value := getattr(text, key, None))]
    caps = [value for key in _SOFTCAP_KEYS if (value := getattr(text, key, None))]
    scales = [1.0, *(factor for value in given if value > 0 for factor in (float(value), 1 / value))]
    for softcap, scale in product([None, *map(float, caps)], scales):  # the plain head first
        head = Head(linear.weight, linear.bias, scale, softcap)
        if _reproduces(model, trunk, head):
            return trunk, head
    return None


@torch.no_grad()
def _reproduces(model: PreTrainedModel, trunk: PreTrainedModel, head: Head) -> bool:
    """Whether the model's logits are the head's, for the trunk's hidden states and for larger ones."""
    input_ids_BL = torch.arange(_PROOF_TOKENS, device=model.device)[None] % len(head.weight_VD)
    hidden_BLD = getattr(trunk(input_ids=input_ids_BL, use_cache=False), "last_hidden_state", None)
    if hidden_BLD is None or hidden_BLD.shape[-1] != head.weight_VD.shape[-1]:
        return False
    product_BLV = torch.nn.functional.linear(hidden_BLD, head.weight_VD)
    largest = product_BLV.abs().max().item() * head.scale
    if largest == 0:  # no factor makes it larger, and every scale and cap would pass
        return False
    for factor in (1.0, _PROOF_LOGIT / largest):

        def enlarge(module: Any, arguments: Any, output: Any, factor: float = factor) -> Any:
            output.last_hidden_state = output.last_hidden_state * factor
            return output

        with trunk.register_forward_hook(enlarge):
            right_BLV = model(input_ids=input_ids_BL, use_cache=False).logits
        logits_BLV = head_logits(hidden_BLD * factor, head)
        if logits_BLV.shape != right_BLV.shape:
            return False
        if not (logits_BLV - right_BLV).abs().max() <= _PROOF_TOLERANCE * right_BLV.abs().max():
            return False
    return True
