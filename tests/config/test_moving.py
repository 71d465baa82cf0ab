"""Every name of TRL has a row, rows name keys that are there, and a mistyped key is answered from them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from grpo.cli.entry import COMMANDS
from grpo.config import flatten, load, moving
from grpo.config.loading import all_keys
from grpo.config.objectives import OBJECTIVES
from grpo.config.yaml import parse
from grpo.errors import UsageError
from grpo.sql import own_text
from grpo.tables import TABLES

ROOT = Path(__file__).parents[2]
ROWS = [
    (trainer, name, text)
    for trainer in moving.TRAINERS
    for rows in moving.table(trainer).values()
    for name, text in rows.items()
]
VIEWS = ("samples", "iterations", "evals", "eval_samples")
OTHER = ("hf auth login", "--json", "artifacts/RUN", "datasets")
TRL_DEFAULTS = ROOT / "examples" / "trl-defaults.yaml"


def told(*settings: str) -> str:
    with pytest.raises(UsageError) as raised:
        load(ROOT / "pipeline.yaml", settings)
    return re.sub(r"^.*?--set:? ", "", str(raised.value))


def test_every_field_of_the_installed_trl_has_a_row() -> None:
    trl = pytest.importorskip("trl")
    rows = {name for trainer, name, _ in ROWS if trainer == "TRL"}
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert len(fields) > 150
    assert fields - rows == set()


def test_every_argument_of_the_installed_trainer_and_of_loras_has_a_row() -> None:
    import inspect

    trl = pytest.importorskip("trl")
    rows = {name for trainer, name, _ in ROWS if trainer == "TRL"}
    arguments = set(inspect.signature(trl.GRPOTrainer.__init__).parameters) - {"self", "args", "model"}
    assert len(arguments) > 8
    assert arguments - rows == set()


def test_what_stands_in_backquotes_is_there() -> None:
    commands = {command.__name__ for panel in COMMANDS.values() for command in panel}
    known = {*all_keys(), *TABLES, *VIEWS, *OTHER}
    assert own_text("sql/views/iterations")  # and the views are files
    for trainer, name, text in ROWS:
        for quoted in re.findall("`([^`]*)`", text):
            is_command = quoted.startswith("grpo ") and quoted.split()[1] in commands
            assert is_command or quoted in known, (trainer, name, quoted)
        assert "\n" not in text


def test_no_row_advises_an_engine_option_that_is_refused() -> None:
    engine_arguments = pytest.importorskip("vllm.engine.arg_utils").EngineArgs
    from grpo.generate.engines.vllm_settings import _OURS  # "the pipeline sets it; leave it out"

    advised = {
        (trainer, name, key)
        for trainer, name, text in ROWS
        for options in re.findall(r"`generate\.engine_options`: (\{[^}]*\})", text)
        for key in parse(options)
    }
    known = {field.name for field in dataclasses.fields(engine_arguments)}
    assert len(advised) >= 8
    assert {each for each in advised if each[2] in _OURS or each[2] not in known} == set()


def test_what_cuts_the_distribution_is_said_to_need_vllm() -> None:
    """As the configuration refuses it, in whichever words the key was given."""
    cuts = {"top_p": 0.9, "top_k": 5, "min_p": 0.1}
    rows = [(trainer, name, text) for trainer, name, text in ROWS if name.rpartition(".")[2] in cuts]
    assert len(rows) >= 5
    for trainer, name, text in rows:
        key = name.rpartition(".")[2]
        if text.startswith("no: "):
            continue
        refused = told(
            f"generate.{key}={cuts[key]}",
            "generate.allow_truncated_sampling=true",
            "generate.engine=transformers",
        )
        assert "needs engine: vllm" in refused
        assert "`generate.engine`: vllm" in text, (trainer, name)


def test_every_row_says_where_it_is_or_why_not() -> None:
    for trainer, name, text in ROWS:
        assert text.startswith(("`", "always", "not needed: ", "not yet", "no: ")), (trainer, name)


def test_what_is_not_yet_there_is_not_there() -> None:
    """Whoever adds a key mends its row: a name that is a key of ours too is no longer missing."""
    ours = {key.rpartition(".")[2] for key in all_keys()}
    for trainer, name, text in ROWS:
        assert not text.startswith("not yet") or name.rpartition(".")[2] not in ours, (trainer, name)
    objectives = set(OBJECTIVES)
    for trainer, name, text in ROWS:
        if text.startswith("not yet: no objective "):
            assert text.rpartition(" ")[2] not in objectives, (trainer, name)


def test_every_value_is_of_a_key_that_is_there_and_is_refused() -> None:
    """A value that the key takes needs no advice: it would never be shown."""
    values: dict[str, dict[str, str]] = moving._read("values")
    assert set(values) - set(all_keys()) == set()


# What somebody who knows TRL or verl types, in the section where they would, and what they are told.
@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("update.beta=0.04", "TRL's beta: update.kl_coefficient; 0.0 there, 0.01 here"),
        ("beta=0.04", "TRL's beta: update.kl_coefficient; 0.0 there, 0.01 here"),
        ("update.num_iterations=2", "TRL's num_iterations: update.epochs: passes over"),
        ("update.num_iteration=2", "TRL's num_iterations: update.epochs: passes over"),
        ("update.epsilon=0.2", "TRL's epsilon: update.clip_low and update.clip_high"),
        ("update.epsilon_high=0.28", "TRL's epsilon_high: update.clip_high"),
        ("generate.num_generations=8", "TRL's num_generations: generate.samples_per_prompt"),
        ("generate.num_generation=8", "TRL's num_generations: generate.samples_per_prompt"),
        ("generate.max_completion_length=9", "TRL's max_completion_length: generate.max_new_tokens"),
        ("update.bf16=true", "TRL's bf16: update.precision: bfloat16"),
        ("update.loss_type=dapo", "TRL's loss_type: update.aggregate: grpo is sequence_mean"),
        ("loss_type=dapo", "TRL's loss_type: update.aggregate: grpo is sequence_mean"),
        ("update.optim=adamw_8bit", "TRL's optim: "),
        ("update.gradient_accumulation_steps=4", "TRL's gradient_accumulation_steps: not needed: "),
        ("evaluate.eval_steps=10", "TRL's eval_steps: evaluate.every"),
        ("checkpoints.save_steps=10", "TRL's save_steps: checkpoints.every"),
        ("update.lora={rank: 8, alpha: 8, r: 8}", "TRL's r: update.lora.rank"),
        ("update.lora={rank: 8, alpha: 8, use_rslora: true}", "TRL's use_rslora: update.lora.rslora"),
        ("update.lora={rank: 8, alpha: 8, dropout: 0.05}", "TRL's dropout: no: the learner would compute"),
        ("update.lora={rank: 8, alpha: 8, lora_dropout: 0.0}", "TRL's lora_dropout: no: the learner would"),
        ("update.ref_model_sync_steps=64", "TRL's ref_model_sync_steps: update.reference_every, which"),
        ("update.entropy_coef_max=0.5", "TRL's entropy_coef_max: update.entropy_coefficient_max"),
        ("update.lora={rank: 8, alpha: 8, target_modules: [a]}", "TRL's target_modules: update.lora.targets"),
        ("report_to=wandb", "TRL's report_to: track: trackio or wandb"),
        ("max_steps=100", "TRL's max_steps: iterations: optimiser steps"),
        ("advantage.scale_rewards=false", "TRL's scale_rewards: advantage.scale"),
        ("score.reward_weights=[1]", "TRL's reward_weights: score.rewards[].weight"),
        ("update.lr=1e-6", "verl's actor_rollout_ref.actor.optim.lr: update.learning_rate"),
        ("update.clip_ratio_c=3", "verl's actor_rollout_ref.actor.clip_ratio_c: update.delta"),
        (
            "actor_rollout_ref.actor.clip_ratio=0.2",
            "verl's actor_rollout_ref.actor.clip_ratio: update.clip_low and",
        ),
        ("algorithm.kl_ctrl.kl_coef=0.1", "verl's algorithm.kl_ctrl.kl_coef: update.kl_coefficient"),
        ("data.train_files=a", "verl's data.train_files: prompts.source"),
        ("data.dataloader_num_workers=8", "verl's data.dataloader_num_workers: not needed: prompts are a"),
        (
            "reward_model.reward_kwargs.overlong_buffer_cfg.len=9",
            "verl's reward_model.reward_kwargs.overlong_buffer_cfg.len: score.rewards[].arguments: {buffer",
        ),
        (
            "+reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0",
            "verl's reward.reward_kwargs.overlong_buffer_cfg.penalty_factor: score.rewards[].weight, of len",
        ),
        (
            "reward_model.reward_kwargs.max_resp_len=99",
            "verl's reward_model.reward_kwargs.max_resp_len: score.rewards[].arguments: {max_tokens: ...} of",
        ),
        (
            "custom_reward_function.reward_kwargs.strict=true",
            "verl's custom_reward_function.reward_kwargs: score.rewards[].arguments: {strict: true}",
        ),
        (
            "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16",
            "verl's actor_rollout_ref.actor.fsdp_config.dtype: update.precision: bfloat16 there",
        ),
        (
            "actor_rollout_ref.actor.fsdp_config.param_offload=True",
            "verl's actor_rollout_ref.actor.fsdp_config.param_offload: no: the policy stays",
        ),
        (
            "actor_rollout_ref.actor.fsdp_config.fsdp_size=2",
            "verl's actor_rollout_ref.actor.fsdp_config: no: FSDP2 where torchrun starts several",
        ),
        (
            "actor_rollout_ref.rollout.max_model_len=4096",
            "verl's actor_rollout_ref.rollout.max_model_len: not needed: as long as the longest prompt and",
        ),
        ("generate.vllm_max_model_length=4096", "TRL's vllm_max_model_length: not needed: as long as the"),
        ("generate.steps_per_generation=8", "TRL's steps_per_generation: update.steps_per_iteration, which"),
        # Our own keys, in another section or misspelt.
        ("update.max_new_tokens=3", "did you mean generate.max_new_tokens, or evaluate.max_new_tokens?"),
        ("epochs=2", "did you mean update.epochs?"),
        ("checkpoints.evry=3", "did you mean every?"),
        ("update.learning_rat=1", "did you mean learning_rate?"),
        ("generate.sample_per_prompt=4", "did you mean samples_per_prompt?"),
    ],
)
def test_a_key_of_theirs_is_answered_in_ours(setting: str, answer: str) -> None:
    key = setting.partition("=")[0]
    assert f"unknown key; {answer}" in told(setting), key


def test_every_name_is_answered_at_the_top_level() -> None:
    keys = all_keys()
    here = [key for key in keys if "." not in key]
    for trainer, name, _ in ROWS:
        value: Any = 1
        first, *rest = name.split(".")
        for part in reversed(rest):
            value = {part: value}
        if first not in here:
            assert moving.answer(first, value, here, keys).startswith(f"{trainer}'s {name}: "), name


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("update.optimizer=adamw_torch_fused", "adamw"),
        ("update.optimizer=paged_adamw_8bit", "adamw_8bit"),
        ("update.optimizer=adamw_bnb_8bit", "adamw_8bit"),
        ("update.lora={rank: 8, alpha: 8, targets: q_proj}", "a list, such as [q_proj, v_proj]"),
        ("update.warmup_steps=0.1", "it as update.warmup_share: 0.1"),
        ("update.warmup_steps=0.05", "it as update.warmup_share: 0.05"),
        ("update.warmup_steps=0.00001", "it as update.warmup_share: 1e-05"),
        ("update.precision=bf16", "bfloat16"),
        ("update.precision=fp16", "bfloat16: float16 needs loss scaling, which is not here"),
        ("update.schedule=cosine_with_min_lr", "cosine, with min_learning_rate"),
        ("update.objective=bnpo", "grpo, with aggregate: token_mean"),
        ("update.aggregate=seq-mean-token-sum-norm", "constant"),
        ("update.kl_estimator=low_var_kl", "k3"),
        ("update.max_grad_norm=0", "null: never"),
        ("advantage.scale=false", "none"),
        ("advantage.truncated=true", "drop"),
        ("generate.top_k=-1", "null: from all"),
        ("generate.engine=hf", "transformers"),
        ("checkpoints.keep_last=-1", "null: all"),
        ("evaluate.every=0.1", "a whole number of iterations"),
        ("score.rewards=exact_answer", 'a list: [{function: "module:name"}]'),
        ("track=tensorboard", "trackio, wandb or null"),
        ("track=none", "null"),
    ],
)
def test_a_value_of_theirs_is_answered(setting: str, answer: str) -> None:
    assert f"; write {answer}" in told(setting)


# ---- examples/trl-defaults.yaml ----

SAME: dict[str, str | tuple[str, dict[Any, Any]]] = {
    "num_generations": "generate.samples_per_prompt",
    "max_completion_length": "generate.max_new_tokens",
    "temperature": "generate.temperature",
    "top_p": "generate.top_p",
    "top_k": ("generate.top_k", {0: None}),
    "min_p": ("generate.min_p", {None: 0.0}),
    "use_vllm": ("generate.engine", {False: "transformers", True: "vllm"}),
    "scale_rewards": "advantage.scale",
    "mask_truncated_completions": ("advantage.truncated", {False: "keep", True: "drop"}),
    "loss_type": ("update.aggregate", {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "constant"}),
    "importance_sampling_level": ("update.ratio", {"token": "token", "sequence": "sequence_mean"}),
    "epsilon": "update.clip_low",
    "delta": "update.delta",
    "beta": "update.kl_coefficient",
    "use_bias_correction_kl": "update.kl_importance",
    "entropy_coef": "update.entropy_coefficient",
    "learning_rate": "update.learning_rate",
    "lr_scheduler_type": "update.schedule",
    "warmup_steps": "update.warmup_steps",
    "weight_decay": "update.weight_decay",
    "adam_epsilon": "update.adam_epsilon",
    "max_grad_norm": "update.max_grad_norm",
    "num_iterations": "update.epochs",
    "gradient_checkpointing": "update.gradient_checkpointing",
    "bf16": ("update.precision", {True: "bfloat16", False: "float32"}),
    "save_total_limit": "checkpoints.keep_last",
    "seed": "seed",
}


def test_the_example_has_the_defaults_of_the_installed_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    there = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    config = load(TRL_DEFAULTS)
    here = flatten(config.model_dump())
    for field, place in SAME.items():
        key, words = (place, {}) if isinstance(place, str) else place
        value = getattr(there, field)
        assert here[key] == words.get(value, value), field
    assert here["update.clip_high"] == (there.epsilon_high or there.epsilon)
    assert here["update.betas"] == [there.adam_beta1, there.adam_beta2]
    assert here["generate.prompts_per_iteration"] * there.num_generations == there.generation_batch_size
    assert (
        here["update.steps_per_iteration"] * there.gradient_accumulation_steps == there.steps_per_generation
    )
    assert config.evaluate is None
    assert there.eval_strategy == "no"
    written = TRL_DEFAULTS.read_text()
    for where in SAME.values():
        name = (where if isinstance(where, str) else where[0]).rpartition(".")[2]
        assert re.search(rf"\b{name}:", written), f"{name} is not written down"
