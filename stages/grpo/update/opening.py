"""opening: a checkpoint -> a reader of its model -> a network that computes as the configuration says."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.errors import UsageError
from grpo.execute import Checkpoint
from grpo.models.loading import check_like, copy_weights, load_model, settle_attention
from grpo.models.reader import Reader, form_of
from grpo.models.slices import Slices, slices_of
from grpo.update.network import Network

if TYPE_CHECKING:
    from grpo.update.parallel import Ranks


_READ = (".safetensors", ".json")  # files that a learner reads of a policy, an adapter or an optimiser


def wait_for(ranks: "Ranks", *folders: Path | None) -> None:
    """Until each process sees the files of `folders` as rank 0 does: on a shared store, names come late.

    Raises ResourceError (exit 7), in all of them, where one does not.
    """
    there = ranks.agreed(lambda: [_seen_here(each) for each in folders if each] if ranks.rank == 0 else None)
    for checkpoint in ranks.from_first(there) or ():
        ranks.agreed(checkpoint.seen)


def _seen_here(folder: Path) -> Checkpoint:
    """With no file where there is none: whoever reads it says what is wrong."""
    sizes = dict[str, int]()
    for path in folder.glob("*"):
        if path.suffix in _READ:
            with suppress(FileNotFoundError):  # pruned meanwhile
                sizes[path.name] = path.stat().st_size
    return Checkpoint(folder, sizes)


def shared_reader(
    checkpoint: Path, attention: str, ranks: "Ranks", prepare: Callable[[PreTrainedModel], object]
) -> Reader:
    """Of the model of a checkpoint, of which this process reads and keeps its part alone.

    prepare: called with the model as long as it is no one's; what it adds is zero. Raises as load_model.
    """
    wait_for(ranks, checkpoint)
    slices = ranks.agreed(partial(slices_of, checkpoint, attention))
    if slices is None:
        ranks.notes.append(_whole(checkpoint))
        # No device need hold all of it.
        model = ranks.agreed(partial(load_model, checkpoint, "cpu", attention))
        prepare(model)
        reader = Reader(model)
        ranks.shard(reader)
        return reader
    reader = filled_reader(slices, ranks, prepare)
    reader.ask(partial(settle_attention, checkpoint=checkpoint, attention=attention))
    reader.form = reader.ask(form_of)
    return reader


def filled_reader(slices: Slices, ranks: "Ranks", prepare: Callable[[PreTrainedModel], object]) -> Reader:
    """The same, before anything is computed with it."""
    model = copy.deepcopy(slices.model)
    prepare(model)
    reader = Reader(model, few=True)
    ranks.shard(reader)
    ranks.materialize(reader, ranks.device)
    ranks.agreed(partial(slices.fill, model, ranks.put))
    return reader


def copy_shared(model: PreTrainedModel, checkpoint: Path, ranks: "Ranks") -> None:
    """Have a model that is shared out compute what load_model(checkpoint) would. Raises as copy_weights."""
    wait_for(ranks, checkpoint)
    slices = ranks.agreed(partial(slices_of, checkpoint, model.config._attn_implementation))
    if slices is None:
        ranks.notes.append(_whole(checkpoint))
        copy_weights(model, checkpoint, ranks.put)
        return
    check_like(model, slices.model, checkpoint)
    ranks.agreed(partial(slices.fill, model, ranks.put))


def _whole(checkpoint: Path) -> str:
    return f"{checkpoint}: not as transformers writes it: each process holds all of it while it loads"


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
