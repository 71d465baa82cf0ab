"""network: a causal language model as the learner reads it: a micro-batch -> log-probs of its counted tokens.

Shapes: S sequences, L tokens of the longest, N counted response tokens, D hidden.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import UsageError
from grpo.models.attention import attending
from grpo.models.reader import Reader
from grpo.update import flex_attention, tree_attention
from grpo.update.batch import Rollouts, made_up_pair
from grpo.update.flex_attention import block_mask
from grpo.update.layout import Cost, Layout, MicroBatch, Tree, build, longest_pair, tree_of

# Largest |difference| of a log-prob between two layouts in float32. Rounding gives 1e-5; a mask that is not
# the model's own gives 0.1 and more.
TOLERANCE = 1e-3
# On a CPU more tokens at once are no faster, and what they compute is too large for the heap to keep: each
# tensor is then new pages of the system's, which made a step 1.3 times as long.
CPU_TOKENS = 4096
# On a GPU rollouts one behind another have no kernel but that of a dense mask, [L, L].
MASKED_TOKENS = 4096


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    tree_attention.NAME: tree_attention.tree_attention,
    flex_attention.NAME: flex_attention.flex_tree_attention,
}


class Network:
    """A model, what it consists of, and the layout it is read in. Nothing is copied."""

    def __init__(self, model: PreTrainedModel, precision: str, *, share_prompts: bool) -> None:
        self.model = model
        self.precision = precision
        self.device = str(model.device)
        self.reader = Reader(model)
        self.flex = model.device.type == "cuda"  # the kernel that trees are read with
        self._own_attention = model.config._attn_implementation
        self.use(layout_of(model, share_prompts=share_prompts))
        if self.layout == "shared" and not self._takes_trees():
            self.use("packed")
        self.best = self.layout

    def use(self, layout: Layout) -> None:
        """Read in `layout` from now on."""
        self.layout = layout
        self.cost = cost_of(self.model, layout, flex=self.flex)

    def batch(self, rollouts: Rollouts, sequences: Sequence[Sequence[Tree]]) -> MicroBatch:
        """The sequences as tensors, as they are read."""
        return build(rollouts, sequences, self.device, self.cost.multiple)

    @torch.no_grad()
    def _takes_trees(self) -> bool:
        """Whether the model hands trees on to its attention, and nothing that this does not compute."""
        pair = made_up_pair(1, 1, vocabulary=1)
        try:
            self.logprobs(self.batch(pair, [[tree_of(pair, [0, 1])]]), exactly=True)
        except TypeError:
            return False
        return True

    def logprobs(
        self, batch: MicroBatch, *, with_entropy: bool = False, exactly: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropy of the counted tokens, float32 [N]. exactly: without autocast."""
        attention, inputs = self._inputs(batch)
        low = self.precision == "bfloat16" and not exactly
        autocast = torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=low)
        with self._attending(attention), autocast:
            found: tuple[Tensor, Tensor | None] = self.reader(
                inputs, batch.places_N, batch.targets_N, batch.temperature_N, with_entropy=with_entropy
            )
        return found

    @torch.no_grad()
    def difference(self, rollouts: Rollouts, rows: np.ndarray) -> float:
        """Largest |difference| of the last of `rows`, all of one group, read with the others and read alone.

        In float32; the last is the longest. A window that the configuration does not name would be ignored
        under the mask of a tree. The sampler read the last alone too, on-policy with the same weights: where
        its stored log-probs agree, the difference is to those, for reading it alone would only say the same.
        """
        apart = [tree_of(rollouts, [row]) for row in rows.tolist()]
        together = [tree_of(rollouts, rows.tolist())] if self.layout == "shared" else [apart[-1], *apart]
        found_N, _ = self.logprobs(self.batch(rollouts, [together]), exactly=True)
        expected_T = torch.tensor(rollouts.old_logprobs[int(rows[-1])]).to(found_N)
        found_T = found_N[-len(expected_T) :]
        if not (found_T - expected_T).abs().max() <= TOLERANCE:  # NaN is not
            expected_T, _ = self.logprobs(self.batch(rollouts, [apart[-1:]]), exactly=True)
        return float((found_T - expected_T).abs().max())

    def checkpoint_gradients(self) -> None:
        """Compute each layer again in the backward pass instead of keeping what it computed."""
        for name, value in dropouts_of(self.model.config).items():
            raise UsageError(
                f"update.gradient_checkpointing: the model has {name} {value}, which transformers would"
                " switch on with it; set it to 0 in the checkpoint's config.json"
            )
        model: Any = self.model

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            # Computed again with the attention that it is computed with now.
            return nullcontext(), self._attending(model.config._attn_implementation)

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # transformers checkpoints only then; its parts stay in eval mode

    def _inputs(self, batch: MicroBatch) -> tuple[str, dict[str, Any]]:
        """The attention to read the batch with, and the arguments of forward()."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_SL, "use_cache": False}
        if self.layout == "rows" or len(batch.rows) == 1:
            return self._own_attention, inputs  # right padding: no real token ever sees it
        inputs["position_ids"] = batch.position_ids_SL
        if self.layout == "packed":
            return self._own_attention, inputs
        if self.flex:
            mask = block_mask(batch.trees, batch.input_ids_SL.shape[1], self.device)
            return flex_attention.NAME, inputs | {"block_mask": mask}
        return tree_attention.NAME, inputs | {"trees": batch.trees}

    def _attending(self, attention: str) -> AbstractContextManager[Any]:
        """Within, the model has `attention`; after it, its own again, for whoever else reads with it."""
        if attention == self._own_attention:
            return nullcontext()
        return attending(self.model, attention, _FUNCTIONS[attention])


def check_layouts(
    networks: Mapping[str, Network],
    rollouts: Rollouts,
    lengths: tuple[int, int],
    last: str | None,
    of_reference: dict[tuple[int, int], float],
) -> dict[str, Any]:
    """See Learner.check_layout(); of_reference: the differences that were found before, by their lengths."""
    found: dict[str, Any] = {}
    for name, network in networks.items():
        if network.best == "rows":
            continue
        network.use(network.best)
        vocabulary = int(network.model.config.get_text_config(decoder=True).vocab_size)
        made_up = (made_up_pair(*lengths, vocabulary), np.arange(2))
        if name == "policy":
            pairs = [] if last == network.best else [made_up]
            pairs += [(rollouts, longest_pair(rollouts))] if len(rollouts) else []
            differences = [network.difference(*pair) for pair in pairs]
        else:
            if lengths not in of_reference:
                of_reference[lengths] = network.difference(*made_up)
            differences = [of_reference[lengths]]
        found[f"{name}_layout_difference"] = max(differences, default=None)
        if not all(difference <= TOLERANCE for difference in differences):  # NaN is not
            found[f"{name}_layout_refused"] = network.best
            network.use("rows")
    return found


def dropouts_of(config: PreTrainedConfig) -> dict[str, float]:
    """What a model would leave out at random in training, by the key of its configuration."""
    return {
        name: value
        for name, value in config.get_text_config(decoder=True).to_dict().items()
        if ("dropout" in name or "pdrop" in name) and not name.startswith("summary_")
        if isinstance(value, float) and value > 0
    }


def layout_of(model: PreTrainedModel, *, share_prompts: bool) -> Layout:
    """The best layout that the model's configuration allows."""
    config = model.config.get_text_config(decoder=True)
    # transformers makes the kind of cache that each layer's attention needs.
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    takes_positions = {"position_ids", "attention_mask"} <= inspect.signature(model.forward).parameters.keys()
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer} or not takes_positions:
        return "rows"
    # transformers 5.19 counts chunks from the start of a packed sequence; alibi counts places, not positions.
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked or getattr(config, "attention_chunk_size", None) or getattr(config, "alibi", False):
        return "rows"
    full = kinds == {DynamicLayer} and model.config._attn_implementation in ("sdpa", "flex_attention")
    return "shared" if full and share_prompts and model._supports_attention_backend else "packed"


def cost_of(model: PreTrainedModel, layout: Layout, *, flex: bool = False) -> Cost:
    """In multiply-adds: a token meets each weight but the embeddings, and each position in each layer."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    # By identity: tied ones are one parameter.
    outside = {id(p) for module in embeddings if module is not None for p in module.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    attention = 2 * config.hidden_size * config.num_hidden_layers
    return Cost(
        per_token=weights,
        per_position=attention if layout == "packed" else 0,
        max_tokens=CPU_TOKENS if model.device.type == "cpu" else Cost.max_tokens,
        longest=MASKED_TOKENS if layout == "packed" else Cost.longest,
        multiple=flex_attention.MULTIPLE if flex and layout == "shared" else 0,
    )
