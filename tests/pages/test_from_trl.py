"""The story of docs/from-trl.md: TRL takes its script, and the configuration beside it says the same.

That the configuration trains is tested where all pages are, in test_docs.py.
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from tests.pages.pages import DOCS, blocks

from grpo.config import Config, flatten
from grpo.config.loading import validated
from grpo.config.yaml import parse

BLOCKS = {block.title: block.text for block in blocks((DOCS / "from-trl.md").read_text()) if block.title}


def calls() -> dict[str, dict[str, Any]]:
    """What train.py calls -> its keyword arguments; those that are no literals are their source."""
    found = {}
    for node in ast.walk(ast.parse(BLOCKS["train.py"])):
        if isinstance(node, ast.Call):
            found[ast.unparse(node.func)] = {str(word.arg): literal(word.value) for word in node.keywords}
    return found


def literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


@pytest.fixture(scope="module")
def config() -> Config:
    return validated(parse(BLOCKS["pipeline.yaml"]), Path("pipeline.yaml"))


def test_the_script_is_one_that_trl_takes() -> None:
    trl = pytest.importorskip("trl")
    script = calls()
    assert set(script["GRPOConfig"]) <= {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert set(script["GRPOTrainer"]) <= set(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    assert len(script["GRPOConfig"]) >= 15


def test_each_argument_of_the_script_is_in_the_configuration(config: Config) -> None:
    script, here = calls(), flatten(config.model_dump())
    theirs = script["GRPOConfig"] | {"model": script["GRPOTrainer"]["model"]}
    prompts = theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
    expected = {
        "run": theirs.pop("output_dir"),
        "iterations": theirs.pop("max_steps"),  # with an optimiser step each
        "update.steps_per_iteration": 1,
        "update.epochs": 1,
        "model": theirs.pop("model"),
        "seed": theirs.pop("seed"),
        # 16 responses in each of 4 micro-batches are 64, of 8 prompts with 8 responses each
        "generate.prompts_per_iteration": prompts // theirs["num_generations"],
        "generate.samples_per_prompt": theirs.pop("num_generations"),
        "generate.max_new_tokens": theirs.pop("max_completion_length"),
        "update.learning_rate": theirs.pop("learning_rate"),
        "update.schedule": theirs.pop("lr_scheduler_type"),
        "update.warmup_steps": theirs.pop("warmup_steps"),
        "update.kl_coefficient": theirs.pop("beta"),
        "update.clip_low": theirs.pop("epsilon"),
        "update.clip_high": theirs.pop("epsilon_high"),
        "advantage.truncated": {True: "drop"}[theirs.pop("mask_truncated_completions")],
        "update.precision": {True: "bfloat16"}[theirs.pop("bf16")],
        "update.lora.rank": script["LoraConfig"]["r"],
        "update.lora.alpha": script["LoraConfig"]["lora_alpha"],
        "update.lora.targets": {"all-linear": None}[script["LoraConfig"]["target_modules"]],
    }
    weights = theirs.pop("reward_weights")
    assert {key: here[key] for key in expected} == expected
    assert set(theirs) == {"per_device_train_batch_size", "gradient_accumulation_steps"}
    functions = script["GRPOTrainer"]["reward_funcs"].strip("[]").split(", ")
    rewards = [(str(reward.function), reward.weight) for reward in config.score.rewards]
    assert rewards == [(f"rewards:{name}", weight) for name, weight in zip(functions, weights, strict=True)]
    assert config.evaluate is not None
    assert config.evaluate.pass_reward == "correct"
    system = ast.literal_eval(BLOCKS["train.py"].partition("SYSTEM = ")[2].split("\n")[0])
    assert config.prompts.system == config.evaluate.prompts.system == system


def test_what_trl_does_by_default_is_written_down(config: Config, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    there = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    aggregates = {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "constant"}
    assert config.update.aggregate == aggregates[there.loss_type]
    assert config.update.kl_importance == there.use_bias_correction_kl
    assert config.update.gradient_checkpointing == there.gradient_checkpointing
    assert config.advantage.scale == there.scale_rewards


def test_the_rewards_score_what_they_should() -> None:
    rewards: dict[str, Any] = {}
    tree = compile(BLOCKS["rewards.py"], "rewards.py", "exec")
    exec(tree, rewards)  # a block of our own page
    chat = [
        [{"role": "assistant", "content": "12 / 60 * 50\n#### 10"}],
        [{"role": "assistant", "content": "#### ten"}],
    ]
    assert rewards["format_reward"](completions=chat) == [1.0, 0.0]
    assert rewards["correct"](completions=["#### 10", "10"], answer=["so\n#### 10", "#### 10"]) == [1.0, 0.0]
