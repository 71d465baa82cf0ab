"""opening: a model that was loaded -> a network that computes with it as the configuration says."""

from typing import Any

from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.models.reader import Reader
from grpo.update.network import Network


def reader_of(model: PreTrainedModel, ranks: Any) -> Reader:
    """A reader of the model; with other `ranks` (parallel.py) this process keeps its part of it alone."""
    reader = Reader(model)
    if ranks is not None:
        ranks.shard(reader)
    return reader


def open_policy(reader: Reader, config: UpdateConfig) -> Network:
    """In its layout, gradient checkpointing and type of weights.

    Raises UsageError (exit 2) where the model does not allow it.
    """
    model, network = reader.model, _open(reader, config)
    if config.gradient_checkpointing:
        network.checkpoint_gradients()
    elif checkpoints_gradients(model):
        model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
    if config.weights == "bfloat16_master":
        network.work_in_copy()
    return network


def checkpoints_gradients(model: PreTrainedModel) -> bool:
    """Whether layers of it are set to be computed again; transformers 5.24 renames its own property."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def open_reference(reader: Reader, config: UpdateConfig, *, narrow: bool = True) -> Network:
    """Frozen, and computing as the policy does: equal weights give equal log-probs.

    narrow: in half the memory, where it computes in bfloat16.
    """
    network = _open(reader, config)
    if config.precision == "bfloat16" and narrow:
        network.narrow(whole=config.weights == "bfloat16_master")
    return network


def _open(reader: Reader, config: UpdateConfig) -> Network:
    shares = config.prompt_sharing == "auto"
    return Network(reader.model, config.precision, share_prompts=shares, reader=reader)
