"""opening: a model that was loaded -> a network that computes with it as the configuration says."""

from functools import partial
from textwrap import shorten
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.errors import UsageError
from grpo.models.reader import Reader
from grpo.update.network import Network


def reader_of(model: PreTrainedModel, ranks: Any) -> Reader:
    """A reader of the model; with other `ranks` (parallel.py) this process keeps its part of it alone."""
    reader = Reader(model)
    if ranks is not None:
        ranks.shard(reader)
    return reader


def open_policy(reader: Reader, config: UpdateConfig, ranks: Any) -> Network:
    """In its layout, gradient checkpointing and type of weights.

    Raises UsageError (exit 2) where the model does not allow it.
    """
    model, network = reader.model, _open(reader, config, ranks)
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


def open_reference(reader: Reader, config: UpdateConfig, ranks: Any) -> Network:
    """Frozen, and computing as the policy does: equal weights give equal log-probs.

    In half the memory, where it computes in bfloat16; of several processes each has a part anyway.
    """
    network = _open(reader, config, ranks)
    if config.precision == "bfloat16" and ranks is None:
        network.narrow(whole=config.weights == "bfloat16_master")
    return network


def _open(reader: Reader, config: UpdateConfig, ranks: Any) -> Network:
    shares = config.prompt_sharing == "auto"
    gather_in = None if ranks is None else partial(ranks.gather_in, reader)
    network = Network(
        reader.model, config.precision, share_prompts=shares, reader=reader, gather_in=gather_in
    )
    if ranks is not None and config.precision == "bfloat16":
        _require_rounded(network)
    return network


@torch.no_grad()
def _require_rounded(network: Network) -> None:
    """Raise UsageError (exit 2) for a model whose layers do not compute with bfloat16 weights."""
    try:
        network.take_part()
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise UsageError(
            "update.precision: bfloat16: several processes gather weights in it, with which"
            f" {network.model.config.model_type} does not compute here: {shorten(str(error), 200)}; set"
            " precision: float32, or start one process"
        ) from error
