"""config.model: the pydantic mirror of pipeline.yaml, one class per section, in stage order.

Every field says its unit, range and what an extreme value means; a field without a default must be given.
`null` is a value described at its field, never "default". The longer sections have a file each.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from grpo.config.artifacts import ArtifactsConfig
from grpo.config.evaluate import PASS_THRESHOLD, EvaluateConfig, StopConfig
from grpo.config.execution import ExecutionConfig
from grpo.config.generate import GenerateConfig
from grpo.config.objectives import objective_settings
from grpo.config.prompts import PromptsConfig
from grpo.config.score import ScoreConfig
from grpo.config.section import ADDED, Count, NonEmpty, NonNegative, Section, wrong_at
from grpo.config.update import UpdateConfig
from grpo.errors import listed


class AdvantageConfig(Section):
    """advantage: rollouts + rewards -> advantages."""

    scale: Literal["group", "batch", "none"] = "group"
    """What r - mean_group is divided by: the group's deviation, the iteration's, or nothing."""
    epsilon: NonNegative = 1e-4
    """Added to the deviation."""
    drop_zero_variance: bool = False
    """true: groups whose rewards are all equal are not trained on."""
    truncated: Literal["keep", "drop"] = "keep"
    """Rollouts that hit max_new_tokens: train on them or not; they count in their group's mean."""
    estimator: Annotated[
        Literal["group", "rloo", "opo", "maxrl", "gdpo", "reinforce_pp", "pass_at_k", "best_of_k"], ADDED
    ] = "group"
    """How rewards become advantages: a file advantage/estimators/NAME.sql; `scale` is of group alone."""
    pass_k: Annotated[Count | None, ADDED] = None
    """k of the estimator pass_at_k, at most generate.samples_per_prompt; null: of any other."""
    max_policy_lag: Annotated[Annotated[int, Field(ge=0, le=2**20)] | None, ADDED] = None
    """Rollouts whose policy is more than this many behind the one that an update trains are stale, and not
    trained on: those replayed too (update.replay_iterations). At least generate.policy_lag; null: any age."""
    where: NonEmpty | None = None
    """One SQL condition over `samples`; a rollout that does not meet it is not trained on. null: all."""
    sql: NonEmpty | None = None
    """File with a query that returns iteration, group_id, sample_id, advantage. null: the estimator's."""

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError for keys of which one has no effect."""
        if self.sql is None and (self.estimator == "pass_at_k") != (self.pass_k is not None):
            raise ValueError("pass_k and `estimator: pass_at_k` belong together; give both or neither")
        if self.sql is not None and self.estimator != "group":
            raise ValueError("estimator names a query, and so does sql; give one of them")


_WITHOUT_EPSILON = ("rloo", "opo", "maxrl", "pass_at_k")


def _check_estimator(given: dict[str, Any], usual: dict[str, Any]) -> None:
    """Raise ValueError for a key that the user changed and the estimator does not read."""
    name = given.get("estimator", "group")
    unread = ["scale"] * (name != "group") + ["epsilon"] * (name in _WITHOUT_EPSILON)
    if changed := [key for key in unread if given.get(key, usual[key]) != usual[key]]:
        raise ValueError(f"advantage.{changed[0]}: the estimator {name} has none; leave the key out")


def _often(value: Any) -> Any:
    """Raise ValueError for what says in no way how often."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _MOST_OFTEN
    is_time = isinstance(value, str) and re.fullmatch("[1-9][0-9]{0,5}m", value)
    if not (is_count or is_time or value == "auto"):
        raise ValueError("expected auto, a number of iterations from 1, or minutes from 1m to 999999m")
    return value


class CheckpointsConfig(Section):
    """Which policies are on disk; the others are rebuilt when they are needed. In no stage's fingerprint."""

    every: Annotated[int | str, BeforeValidator(_often)] = "auto"
    """When a policy is written: `auto`, as often as takes 2 % of the time, and every 30 minutes; a number:
    each policy whose number is a multiple of it; minutes, as `15m`. The last of a command always is."""
    keep_last: Annotated[int, Field(ge=1)] | None = 2
    """Checkpoints kept, the newest ones, each with its optimiser state; null: all."""
    keep_every: Count | None = None
    """Policies whose number is a multiple of this are written and kept too; null: none of the older ones."""
    keep_best: Annotated[bool, ADDED] = True
    """The best of the policies measured, by `stop.metric`, is kept too, with the policy that is its reference
    (update.reference_every)."""


_MOST_OFTEN = 2**31
_NOT_LOADED = {
    **dict.fromkeys(("dtype", "torch_dtype"), "weights are float32; say update.precision, or engine_options"),
    **dict.fromkeys(
        ("quantization_config", "load_in_8bit", "load_in_4bit"),
        "what is trained is not quantised; the engine may be, by generate.engine_options.quantization",
    ),
    "device_map": "the device is the machine's: a GPU where one is there",
}


class ModelOptions(Section):
    """How `model` is loaded, and a reference of its own (docs/models.md)."""

    revision: Annotated[NonEmpty | None, ADDED] = None
    """Branch, tag or commit of a `model` from the hub; null: its newest. A local directory has none."""
    attn_implementation: Annotated[Literal["auto", "sdpa", "eager"], ADDED] = "auto"
    """Attention of learner, reference and built-in engine. auto: sdpa, and eager for a model that sdpa does
    not compute (a softcap)."""
    trust_remote_code: Annotated[Literal[False], ADDED] = False
    """Stays false: code that comes with a checkpoint never runs."""

    @model_validator(mode="before")
    @classmethod
    def _say_why_not(cls, data: Any) -> Any:
        """Raise ValueError for an option of from_pretrained() that has another place here, or none."""
        given = data if isinstance(data, dict) else {}
        if given.get("trust_remote_code"):
            raise ValueError(
                "trust_remote_code stays false: code that comes with a checkpoint never runs here; take a"
                " checkpoint of a model that transformers has"
            )
        if refused := next((key for key in given if key in _NOT_LOADED), None):
            raise ValueError(f"{refused}: {_NOT_LOADED[refused]}; leave it out")
        return data


class Config(Section):
    """The whole of pipeline.yaml."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run, a folder below artifacts/."""
    iterations: Count = 100
    """generate -> score -> advantage -> update, this many times."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random. Fixed for a run."""
    model: NonEmpty
    """The starting policy: a checkpoint directory, a hub id, or `tiny-arithmetic`. Fixed for a run."""
    model_options: Annotated[ModelOptions, ADDED] = ModelOptions()
    prompts: PromptsConfig
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig
    advantage: AdvantageConfig = AdvantageConfig()
    update: UpdateConfig = UpdateConfig()
    evaluate: EvaluateConfig | None = None
    """What policies are measured on while the run trains; null: they are not."""
    stop: Annotated[StopConfig | None, ADDED] = None
    """When a run ends before its `iterations`, by what `evaluate` finds; null: never."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    sql_timeout_s: Annotated[float, Field(gt=0, le=1e6), ADDED] = 600.0
    """Seconds, at most 1e6, that a query of the configuration may take: generate.prompts_sql, advantage.sql
    and where. In no stage's fingerprint."""
    execution: Annotated[ExecutionConfig | None, ADDED] = None
    """Where work runs; null: in this process."""
    artifacts: Annotated[ArtifactsConfig, ADDED] = ArtifactsConfig()
    track: Literal["trackio", "wandb"] | None = None
    """Log each iteration to Trackio or Weights & Biases too; null: to neither. In no stage's fingerprint."""

    def loaded_with(self) -> dict[str, Any]:
        """Of model_options, what changes results beside the checkpoint itself, for fingerprints."""
        values = self.model_options.recorded({"revision"})
        return {"model_options": values} if values else {}

    @model_validator(mode="before")
    @classmethod
    def _apply_objective(cls, data: Any) -> Any:
        """Fill in what the objective sets and the user did not write."""
        if not isinstance(data, dict):
            return data
        sections = {name: data.get(name, {}) for name in ("update", "advantage")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return data  # the field's own check says what is wrong
        settings = objective_settings(sections["update"])
        if settings:
            epsilon = AdvantageConfig.model_fields["epsilon"].default
            _check_estimator(sections["advantage"], {"epsilon": epsilon, **settings["advantage"]})
        return {**data, **{name: {**settings.get(name, {}), **given} for name, given in sections.items()}}

    @property
    def unrewarded(self) -> bool:
        """Whether teachers alone say what is good: no reward counts, and no rollout is compared."""
        return bool(self.score.teachers) and not any(reward.weight for reward in self.score.rewards)

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError where one section asks for what another does not give."""
        self._check_teachers()
        name = self.evaluate.pass_reward if self.evaluate else None
        names = [reward.name for reward in self.score.rewards]
        if name is not None and name not in names:
            raise ValueError(
                f"evaluate.pass_reward: no reward is named {name}; there are {listed(names, name)}"
            )
        self._check_stop()
        self._check_lag()
        pass_k, samples = self.advantage.pass_k, self.generate.samples_per_prompt
        if pass_k is not None and pass_k > samples:
            raise ValueError(
                f"advantage.pass_k: {pass_k} of generate.samples_per_prompt, {samples}; lower it"
            )
        update = self.update
        num_steps = self.iterations * update.epochs * update.steps_per_iteration
        if update.warmup_steps > num_steps:
            raise ValueError(
                f"update.warmup_steps: {update.warmup_steps} are more than the {num_steps} optimiser steps of"
                " the run (iterations * update.epochs * update.steps_per_iteration); lower it, or raise"
                " `iterations`"
            )

    def _check_teachers(self) -> None:
        if self.generate.samples_per_prompt < 2 and not self.unrewarded:
            raise wrong_at(("generate", "samples_per_prompt"), "greater_than_equal", 1, ge=2)
        if not self.score.teachers:
            return
        update, without = self.update, "teachers give each token an advantage of its own"
        if update.ratio != "token":
            raise ValueError(
                f"score.teachers: {without}, and update.ratio {update.ratio} has one value per rollout; take"
                " an objective of ratio token"
            )
        if update.off_policy_mask is not None:
            raise ValueError(f"update.off_policy_mask: is for rollouts of A < 0; {without}; leave it out")
        if self.generate.dynamic_sampling is not None and self.unrewarded:
            raise ValueError(
                "generate.dynamic_sampling: looks for rewards that differ, and there is no reward"
            )
        if self.evaluate is not None and not self.score.rewards:
            raise ValueError(
                "evaluate: measures by a reward; give one in score.rewards, of weight 0 if need be"
            )

    def _check_lag(self) -> None:
        lag, update, most = self.generate.policy_lag, self.update, self.advantage.max_policy_lag
        if most is not None and most < lag:
            raise ValueError(
                f"advantage.max_policy_lag: {most} is less than generate.policy_lag, {lag}, so every rollout"
                f" would be stale; {lag} or more is right, or null"
            )
        if lag and update.old_logprobs == "recomputed" and update.sampler_correction == "none":
            raise ValueError(
                f"generate.policy_lag: with update.old_logprobs recomputed the ratio forgets {lag} updates"
                " between sampling and training; set update.sampler_correction: truncate or mask, which"
                " weighs them, or old_logprobs: sampled"
            )

    def _check_stop(self) -> None:
        if self.stop is None:
            return
        if self.evaluate is None:
            raise ValueError("stop: goes by evaluations, and `evaluate` is not configured; give both")
        self.stop.check(self.evaluate.samples_per_prompt, [reward.name for reward in self.score.rewards])

    @property
    def passing(self) -> tuple[str | None, float]:
        """Name of the reward that says whether a response passes (None: there is none), and from where on."""
        first = next((reward.name for reward in self.score.rewards), None)
        if self.evaluate is None:
            return first, PASS_THRESHOLD
        return self.evaluate.pass_reward or first, self.evaluate.pass_threshold
