"""network: a causal language model as the learner reads it: a micro-batch -> log-probs of its counted tokens.

Shapes: S sequences, L tokens of the longest, N counted response tokens, D hidden.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from textwrap import shorten
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
from grpo.update.layout import Cost, Layout, MicroBatch, Tree, build, tree_of
from grpo.update.working_copy import WorkingCopy, narrow

# Largest |difference| of a log-prob between two layouts in float32. Rounding gives 1e-5; a mask that is not
# the model's own gives 0.1 and more.
TOLERANCE = 1e-3
# The mean in bfloat16, where rounding gives 1e-2, and 0.1 at some token among thousands.
ROUNDED_TOLERANCE = 0.05
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
    """A model in float32, what it consists of, and the layout it is read in. Nothing is copied.

    precision: float32, or bfloat16, in which it computes under autocast until work_in_copy() or narrow().
    reader: of the model, where there is one. gather_in: has weights that are shared out gathered in a type.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        precision: str,
        *,
        share_prompts: bool,
        reader: Reader | None = None,
        gather_in: Callable[[torch.dtype], None] | None = None,
    ) -> None:
        self.model = model
        self.precision = precision
        self.copy: WorkingCopy | None = None  # that it computes with
        self.is_narrow = False  # whether float32 weights are left nowhere
        self._rounding: Callable[[], AbstractContextManager[Any]] = nullcontext
        if precision == "bfloat16":
            self._rounding = partial(torch.autocast, model.device.type, dtype=torch.bfloat16)
        self._gather_in = gather_in
        if gather_in is not None:
            gather_in(getattr(torch, precision))
        self.device = str(model.device)
        self.reader = reader or Reader(model)
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
        try:
            self.logprobs(self._two_tokens(), exactly=True)
        except TypeError:
            modules: Iterable[Any] = self.reader.modules()
            for module in modules:
                if hasattr(module, "reshard"):  # what other processes have a part of would stay whole here
                    module.reshard()
            return False
        return True

    def _two_tokens(self) -> MicroBatch:
        pair = made_up_pair(1, 1, vocabulary=1)
        return self.batch(pair, [[tree_of(pair, [0, 1] if self.layout == "shared" else [0])]])

    def work_in_copy(self) -> None:
        """Compute with bfloat16 copies of the weights from now on, without autocast.

        Raises UsageError (exit 2) for a model that cannot: some keep a part of what they compute in float32.
        """
        self.copy = WorkingCopy(self.model)
        self._rounding = self.copy.in_place
        try:
            self.logprobs(self._two_tokens())[0].sum().backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            message = (
                f"update.weights: bfloat16_master: {self.model.config.model_type} cannot compute with it"
            )
            raise UsageError(f"{message}: {shorten(str(error), 200)}; set weights: float32") from error
        self.model.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        """The weights have changed: a copy of them does too."""
        if self.copy is not None:
            self.copy.refresh()

    def drop_copy(self) -> None:
        """Free its memory until refresh()."""
        if self.copy is not None:
            self.copy.drop()

    def narrow(self, *, whole: bool) -> None:
        """Have no float32 weights, of a model that does not train: half the memory, and no casts.

        whole: all in bfloat16, and computing as in a copy. Else only what autocast rounds at each use, so
        that no bit of a log-prob changes.
        """
        narrow(self.model, whole=whole)
        self.is_narrow = True
        if whole:
            self._rounding = nullcontext

    def logprobs(
        self, batch: MicroBatch, *, with_entropy: bool = False, exactly: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropy of the counted tokens, float32 [N]. exactly: in float32."""
        assert not (exactly and self.is_narrow)
        attention, inputs = self._inputs(batch)
        with self._attending(attention), self.exactly() if exactly else self._rounding():
            found: tuple[Tensor, Tensor | None] = self.reader(
                inputs, batch.places_N, batch.targets_N, batch.temperature_N, with_entropy=with_entropy
            )
        return found

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Within, the weights are what they are in float32; without gradients."""
        if self._gather_in is None or self.precision == "float32":
            yield
            return
        self._gather_in(torch.float32)
        try:
            yield
        finally:
            self._gather_in(torch.bfloat16)

    def take_part(self) -> None:
        """Read, and backwards too where gradients are asked for, with nothing to add to them.

        For a process that has no micro-batch while others have one.
        """
        logprobs_N, _ = self.logprobs(self._two_tokens(), with_entropy=True)
        if logprobs_N.requires_grad:
            (logprobs_N.sum() * 0).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def difference(self, rollouts: Rollouts, rows: np.ndarray, *, exactly: bool = False) -> float:
        """|difference| of the last of `rows`, all of one group, read with the others and read alone, in nats.

        exactly: in float32; else in the precision in use, as what comes next. The largest of a token in
        float32, the mean in bfloat16; see tolerance(). The last is the longest: a window that the
        configuration does not name would be ignored under the mask of a tree. The sampler read the last alone
        too, on-policy with the same weights: where its stored log-probs agree, the difference is to those,
        for reading it alone would only say the same.
        """
        over = torch.max if self._is_exact(exactly) else torch.mean
        apart = [tree_of(rollouts, [row]) for row in rows.tolist()]
        together = [tree_of(rollouts, rows.tolist())] if self.layout == "shared" else [apart[-1], *apart]
        found_N, _ = self.logprobs(self.batch(rollouts, [together]), exactly=exactly)
        expected_T = torch.tensor(rollouts.old_logprobs[int(rows[-1])]).to(found_N)
        found_T = found_N[-len(expected_T) :]
        difference = float(over((found_T - expected_T).abs()))
        if not difference <= self.tolerance(exactly=exactly):  # NaN is not
            expected_T, _ = self.logprobs(self.batch(rollouts, [apart[-1:]]), exactly=exactly)
            difference = float(over((found_T - expected_T).abs()))
        return difference

    def tolerance(self, *, exactly: bool = False) -> float:
        """The largest difference() that is rounding."""
        return TOLERANCE if self._is_exact(exactly) else ROUNDED_TOLERANCE

    def _is_exact(self, exactly: bool) -> bool:
        return exactly or self.precision == "float32"

    def checkpoint_gradients(self) -> None:
        """Compute each layer again in the backward pass instead of keeping what it computed."""
        for name, value in dropouts_of(self.model.config).items():
            raise UsageError(
                f"update.gradient_checkpointing: the model has {name} {value}, which transformers would"
                " switch on with it; set it to 0 in the checkpoint's config.json"
            )
        model: Any = self.model

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), self._as_now()

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # transformers checkpoints only then; its parts stay in eval mode

    def _as_now(self) -> AbstractContextManager[None]:
        """A context in which a layer is computed again with the attention and the weights that it has now."""
        attention = self._attending(self.model.config._attn_implementation)
        weights = self.copy.in_place() if self.copy is not None and self.copy.is_in_place else nullcontext()

        @contextmanager
        def again() -> Iterator[None]:
            with attention, weights:
                yield

        return again()

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
