"""evaluate, planned: what the evaluation of a policy depends on."""

from typing import Any

from grpo.artifacts import EVALUATION, ActiveRun, Plan
from grpo.artifacts.files import sha256_of
from grpo.config import EvaluateConfig
from grpo.errors import UsageError
from grpo.generate import plan as generate
from grpo.prompts.chat import chat_of
from grpo.prompts.table import HELD_OUT, described
from grpo.score import plan as score

NAME = "evaluate"
OUTPUT = EVALUATION
STAGE_VERSION = 1
ROLLOUTS, REWARDS, JUDGEMENTS = "eval_rollouts", "eval_rewards", "eval_judgements"
SEEDS = "evaluation"  # in the place of an iteration's number: no seed of training is made of it
# What of `generate` an evaluation depends on; the rest says what is sampled in training.
_OF_ENGINE = (
    *("engine", "engine_options", "top_p", "top_k", "min_p", "max_rows_per_batch"),
    *("stop", "repetition_penalty", "structured_outputs"),  # described where they are used
)


def config_of(run: ActiveRun) -> EvaluateConfig:
    """The section. Raises UsageError (exit 2) where there is none."""
    if run.config.evaluate is None:
        raise UsageError("evaluate: is not configured; say in `evaluate.prompts.source` what to measure with")
    return run.config.evaluate


def settings(run: ActiveRun) -> dict[str, Any]:
    """What is sampled and what passes, every null resolved."""
    config, sampled = config_of(run), run.config.generate
    given = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    return {
        "samples_per_prompt": config.samples_per_prompt,
        **{key: getattr(sampled, key) if value is None else value for key, value in given.items()},
        **dict(zip(("pass_reward", "pass_threshold"), run.config.passing, strict=True)),
    }


def plan(run: ActiveRun, policy: int) -> Plan:
    """What an evaluation of `policy` would do now. Raises InputError (exit 4) where it is not there.

    The prompts count as a source, not as something read: other prompts make what was measured with the old
    ones differ, as any change of the configuration does, and not stale.
    """
    config = config_of(run)
    prompts = run.require(HELD_OUT, None, "grpo run")
    if policy > 0:
        run.require("update", policy - 1, f"grpo update --iteration {policy - 1}")
    sampled = generate.described(run.config.generate)
    size = run.config.generate.rollouts_per_shard
    sources = {**score.user_files_of(run), "evaluate.prompts": prompts.ids[HELD_OUT]}
    if config.prompts.chat_template is not None:
        chat_of(config.prompts, run.imports)  # says so where the file cannot be read
        sources["evaluate.prompts.chat_template"] = sha256_of(run.imports / config.prompts.chat_template)
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=policy,
        config={
            "seed": run.config.seed,
            **run.config.loaded_with(),
            "evaluate": {**settings(run), "prompts": described(run, HELD_OUT)},
            "generate": {
                "version": generate.STAGE_VERSION,
                **{key: sampled[key] for key in _OF_ENGINE if key in sampled},
            },
            "score": {"version": score.STAGE_VERSION, "rewards": score.described(run)},
        },
        inputs={f"policy@{policy}": run.id_of(f"policy@{policy}") or ""},
        user_files=sources,
        shards=generate.shards_of(prompts.rows, config.samples_per_prompt, size),
    )
