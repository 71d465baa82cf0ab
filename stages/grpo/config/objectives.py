"""config.objectives: the keys that each update.objective sets (docs/math.md)."""

from collections.abc import Mapping
from typing import Any

from grpo.config.surrogates import READ_BY

_GRPO: dict[str, Any] = {
    "ratio": "token",
    "surrogate": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregate": "sequence_mean",
    "kl_coefficient": 0.01,
    "kl_estimator": "k3",
    "old_logprobs": "sampled",
}


def _sets(scale: str = "group", drop_zero_variance: bool = False, **update: Any) -> dict[str, dict[str, Any]]:
    advantage = {"scale": scale, "drop_zero_variance": drop_zero_variance}
    return {"update": _GRPO | update, "advantage": advantage}


# What an objective sets, by section: the same keys for each, written as what differs from grpo. A key that
# the user writes wins.
OBJECTIVES = {
    "grpo": _sets(),
    "grpo_sequence": _sets(
        ratio="sequence", aggregate="sequence_sum", kl_estimator="k1", old_logprobs="recomputed"
    ),
    "dr_grpo": _sets(aggregate="constant", kl_coefficient=0.0, scale="none"),
    "dapo": _sets(clip_high=0.28, aggregate="token_mean", kl_coefficient=0.0, drop_zero_variance=True),
    "gspo": _sets(
        ratio="sequence_mean", clip_low=3e-4, clip_high=4e-4, kl_coefficient=0.0, old_logprobs="recomputed"
    ),
    "cispo": _sets(
        surrogate="cispo", clip_low=None, clip_high=4.0, aggregate="token_mean", kl_coefficient=0.0
    ),
    "sapo": _sets(surrogate="sapo", clip_low=None, clip_high=None, kl_coefficient=0.0),
    "gmpo": _sets(ratio="sequence_mean", surrogate="gmpo", clip_low=0.4, clip_high=0.4, kl_coefficient=0.0),
    "dppo": _sets(surrogate="dppo_tv", aggregate="token_mean", kl_coefficient=0.0),
    "vespo": _sets(
        surrogate="vespo", clip_low=None, clip_high=None, aggregate="token_mean", kl_coefficient=0.0
    ),
    "scalerl": _sets(
        scale="batch",
        drop_zero_variance=True,
        surrogate="cispo",
        clip_low=None,
        clip_high=4.0,
        aggregate="prompt_mean",
        kl_coefficient=0.0,
    ),
}


def objective_settings(update: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the objective of an `update` section sets, by section: no clip where its surrogate has none."""
    settings = OBJECTIVES.get(str(update.get("objective", "grpo")), {})
    surrogate = update.get("surrogate", "clip")  # every objective's own has the clip that it reads
    if not settings or surrogate in READ_BY["clip_low"]:
        return settings
    return {**settings, "update": settings["update"] | {"clip_low": None, "clip_high": None}}
