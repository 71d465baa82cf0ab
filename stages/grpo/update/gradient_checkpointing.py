"""gradient_checkpointing: whether layers are computed again in the backward pass, where that is left to us.

Decided when the learner is opened, from the memory that is free then. It changes no result, so it is part of
no fingerprint; each update records what it was.
"""

import os

import torch

from grpo.artifacts import ActiveRun
from grpo.config import UpdateConfig
from grpo.models.device import main_memory
from grpo.models.loading import best_device, load_config
from grpo.models.size import num_parameters, shape_of
from grpo.update.memory import Needs, longest_batch, needs
from grpo.update.network import dropouts_of
from grpo.update.plan import resolved

_GIB = 2**30


def resolve(run: ActiveRun) -> UpdateConfig:
    """`update` of the run as this machine computes it: see plan.resolved(). Says so where memory is short."""
    update, on_gpu = run.config.update, best_device() != "cpu"
    if update.gradient_checkpointing != "auto":
        return resolved(update, on_gpu=on_gpu)
    longest = run.require("prompts", None, "grpo run").summary["longest_prompt_tokens"]
    tokens = longest_batch(run.config, int(longest), on_gpu=on_gpu)
    kept = resolved(update, on_gpu=on_gpu)
    without, free = _needs(run, kept, tokens, on_gpu=on_gpu), _free(on_gpu=on_gpu)
    world, replicas = (1, 1) if run.ranks is None else (run.ranks.world, run.ranks.replicas)
    beside = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", world))  # in the same memory
    if without is None or (needed := without.beside(world, replicas, beside).total) <= free:
        return kept
    run.console.say(
        f"update.gradient_checkpointing: auto is true here: a micro-batch of {tokens:,} tokens needs"
        f" {needed / _GIB:.1f} GiB without, and {free / _GIB:.1f} GiB are free"
    )
    return resolved(update, on_gpu=on_gpu, checkpointing=True)


def _needs(run: ActiveRun, update: UpdateConfig, tokens: int, *, on_gpu: bool) -> Needs | None:
    """None where it is not known, or the model has dropouts, which go with no checkpointing."""
    config = load_config(run.start["policy"])
    shape = shape_of(config)
    if shape is None or dropouts_of(config):
        return None
    reference = num_parameters(run.start["reference"]) if has_reference(update) else 0
    parameters, is_shared = num_parameters(run.start["policy"]), run.ranks is not None
    return needs(shape, parameters, update, tokens, reference, on_gpu=on_gpu, is_shared=is_shared)


def has_reference(update: UpdateConfig) -> bool:
    """Whether the reference of the KL term is a model of its own: the base of an adapter is one already."""
    alone = update.lora is not None and not update.lora.modules_to_save
    shares_base = alone and update.reference is None and update.reference_every is None
    return bool(update.kl_coefficient) and not shares_base


def _free(*, on_gpu: bool) -> int:
    """Bytes that nobody holds; what torch keeps of a GPU without using it is free."""
    if not on_gpu:
        return main_memory()[1]
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + kept
