"""opening: a model that was loaded -> a network that computes with it as the configuration says."""

from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.update.network import Network


def open_policy(model: PreTrainedModel, config: UpdateConfig) -> Network:
    """In its layout, gradient checkpointing and type of weights.

    Raises UsageError (exit 2) where the model does not allow it.
    """
    network = _open(model, config)
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


def open_reference(model: PreTrainedModel, config: UpdateConfig) -> Network:
    """Frozen, and computing as the policy does: equal weights give equal log-probs."""
    network = _open(model.requires_grad_(False), config)
    if config.precision == "bfloat16":
        network.narrow(whole=config.weights == "bfloat16_master")
    return network


def _open(model: PreTrainedModel, config: UpdateConfig) -> Network:
    return Network(model, config.precision, share_prompts=config.prompt_sharing == "auto")
