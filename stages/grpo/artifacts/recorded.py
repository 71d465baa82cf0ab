"""artifacts.recorded: what a manifest holds for those who read it, by the stage that made it.

A seal finds damage and is no signature: a run may come from anybody. So what is read of a manifest has a type
and bounds, checked where it is parsed; what is beside it is compared and shown, and nothing else.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo.artifacts.layout import OUTPUTS, RUN_OUTPUTS, holder_of
from grpo.errors import CorruptError

MAX_DEPTH = 128  # of lists and mappings; a configuration may be 100 deep
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
"""Of rows, rounds, attempts: tables count in int32."""
Iteration = Annotated[int, Field(ge=0, lt=10**9)]
"""A folder's number has nine digits at most."""
Text = Annotated[str, Field(max_length=2**16)]
Share = float | None


class _Held(BaseModel):
    """Strict about what it names; what it does not name is left alone. What is missing is for Recorded."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Chosen(_Held):
    min_groups: Number = 0
    max_rounds: Number = 0


class _Generate(_Held):
    max_new_tokens: Number = 0
    samples_per_prompt: Number = 0
    prompts_per_iteration: Number = 0
    dynamic_sampling: _Chosen | None = None


class _GenerateConfig(_Held):
    seed: Count = 0
    generate: _Generate = _Generate()


class _GenerateSummary(_Held):
    rounds: Annotated[Number, Field(ge=1)] = 1
    response_tokens: Count = 0
    mean_response_tokens: Share = None
    truncated_fraction: Share = None
    policy_lag: Number = 0


class _Rollouts(_Held):
    config: _GenerateConfig
    summary: _GenerateSummary


class _ScoreSummary(_Held):
    failed: Number = 0
    statuses: dict[str, Number] = {}
    weights: dict[str, float] = {}
    groups_with_signal: Number = 0


class _Rewards(_Held):
    summary: _ScoreSummary


class _AdvantageSummary(_Held):
    reward_mean: Share = None


class _Advantages(_Held):
    summary: _AdvantageSummary


class _Update(_Held):
    replay_iterations: Number = 0


class _UpdateConfig(_Held):
    update: _Update = _Update()
    max_policy_lag: Number | None = None


class _UpdateSummary(_Held):
    kl_mean: Share = None
    entropy_mean: Share = None
    mismatch_mean: Share = None
    stale: Number = 0
    layout: Text | None = None
    weights: Text | None = None
    moved: bool = True


class _Execution(_Held):
    """How an update was computed. Threads are bounded: a replay starts so many."""

    device: Text = ""
    cpu_capability: Text = ""
    threads: Annotated[int, Field(ge=1, le=2**12)] = 1
    processes: Annotated[Number, Field(ge=1)] = 1
    replicas: Annotated[Number, Field(ge=1)] = 1
    torch: Text = ""
    max_tokens_per_batch: Annotated[Number, Field(ge=1)] = 1
    gradient_checkpointing: bool = False
    prompt_sharing: Literal["auto", "off"] = "auto"
    layouts: dict[Literal["policy", "reference"], Literal["shared", "packed", "rows"]] = {}
    determinism: Literal["exact", "checked"] = "exact"


class _Updates(_Held):
    config: _UpdateConfig
    summary: _UpdateSummary
    execution: _Execution = _Execution()


_Shares = dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")], float] | None


class _Measured(_ScoreSummary):
    prompts: Number = 0
    samples: Count = 0
    unscored: Count = 0
    pass_at: _Shares = None
    pass_at_low: _Shares = None
    pass_at_high: _Shares = None
    reward: Share = None
    reward_low: Share = None
    reward_high: Share = None
    rewards: dict[str, Share] = {}
    response_tokens: Share = None
    truncated: Share = None

    @model_validator(mode="after")
    def _same_k(self) -> "_Measured":
        if (
            not (self.pass_at or {}).keys()
            == (self.pass_at_low or {}).keys()
            == (self.pass_at_high or {}).keys()
        ):
            raise ValueError("pass_at, pass_at_low and pass_at_high are not of the same k")
        return self


class _MadeWith(_Held):
    samples_per_prompt: Number = 0
    temperature: float = 0.0
    max_new_tokens: Number = 0
    pass_reward: Text = ""
    pass_threshold: float = 0.0


class _EvaluateConfig(_Held):
    evaluate: _MadeWith = _MadeWith()


class _Evaluation(_Held):
    config: _EvaluateConfig
    summary: _Measured


class _PromptsConfig(_Held):
    prompts: dict[str, Any] = {}


class _PromptsSummary(_Held):
    longest_prompt_tokens: Number = 0
    source: Text | None = None
    policy: Text | None = None


class _Prompts(_Held):
    config: _PromptsConfig
    summary: _PromptsSummary


class _Start(_Held):
    policy: Text = ""
    reference: Text = ""


class _Policy(_Held):
    config: _Start
    ids: dict[Literal["policy", "reference"], str]
    summary: _Start


class _Written(_Held):
    weights: Text = ""


class _Checkpoint(_Held):
    summary: _Written


_MODELS: dict[str, type[_Held]] = {
    "generate": _Rollouts,
    "score": _Rewards,
    "advantage": _Advantages,
    "update": _Updates,
    "checkpoint": _Checkpoint,
    "evaluate": _Evaluation,
    "prompts": _Prompts,
    "eval_prompts": _Prompts,
    "policy": _Policy,
}
_SCORED: dict[str, Any] = {"reward": str, "weight": int | float, "statuses": dict}
_LABELS: dict[str, dict[str, Any]] = {  # of a file, by its table: what stages note of it
    "rollouts": {"response_tokens": int, "truncated": int},
    "eval_rollouts": {"response_tokens": int, "truncated": int},
    "rewards": _SCORED,
    "eval_rewards": _SCORED,
    "judgements": {"reward": str},
    "eval_judgements": {"reward": str},
}


class Recorded(dict[str, Any]):
    """A part of a manifest, by name. Raises CorruptError (exit 6) for what is asked of it and not there."""

    def __init__(self, where: object, values: dict[str, Any]) -> None:
        inner = {key: Recorded(where, value) for key, value in values.items() if isinstance(value, dict)}
        super().__init__(values | inner)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise CorruptError(f"{self.where}: has no {key}, which its stage records")


def check_content(manifest: dict[str, Any]) -> None:
    """Raise ValueError (pydantic's is one) for what no stage of that name records."""
    model = _MODELS.get(manifest["stage"])
    if model is None:
        raise ValueError(f"stage: no stage is called {manifest['stage'][:80]}")
    model.model_validate(manifest)
    # A checkpoint is of the policy that its update made: the one after.
    latest = manifest["iteration"] + 1 if manifest["stage"] == "checkpoint" else manifest["iteration"]
    for reference in manifest["inputs"]:
        _check_reference(reference, latest)
    for file in manifest["files"]:
        _check_labels(file)
    names = [(file.get("part", ""), file["name"]) for file in manifest["files"]]
    if len({*names}) < len(names):
        raise ValueError("files: names a file twice")
    rounds = manifest["summary"].get("rounds", 1) if manifest["stage"] == "generate" else 1
    if len(manifest["files"]) % rounds:
        raise ValueError(f"summary.rounds: {rounds}, but it has {len(manifest['files'])} files")


def _check_reference(reference: str, latest: int | None) -> None:
    """What an output read is of iteration `latest` or an earlier one; of a run as a whole, nothing is."""
    found = re.fullmatch(r"[^@]{1,256}(@(?P<at>[0-9]{1,9}))?", reference)
    at = int(found["at"]) if found and found["at"] else None
    of_run = at is None and reference in ("prompts", "eval_prompts", "reference")
    earlier = at is not None and latest is not None and at <= latest
    if found and (of_run or (earlier and holder_of(reference)[0] in (*OUTPUTS, *RUN_OUTPUTS))):
        return
    raise ValueError(f"inputs: {reference[:80]} is nothing that can have been read up to iteration {latest}")


def _check_labels(file: dict[str, Any]) -> None:
    labels = file.get("labels", {})
    for name, kind in _LABELS.get(file.get("table") or "", {}).items():
        if name in labels and (isinstance(labels[name], bool) or not isinstance(labels[name], kind)):
            raise ValueError(f"files: {name} of {file['name']} is of another type")
    counts = labels.get("statuses", {})
    if not isinstance(counts, dict) or not all(
        isinstance(count, int) and count >= 0 for count in counts.values()
    ):
        raise ValueError(f"files: statuses of {file['name']} are no counts")
