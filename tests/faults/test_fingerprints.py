"""Every key of the configuration, one by one: which stages differ when it changes, and no others."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from tests.conftest import Grpo
from tests.faults import crash

from grpo.config import Config

FIXED = "fixed for the run"
NOTHING: set[str] = set()
UPDATE, GENERATE, ADVANTAGE, EVALUATE = {"update"}, {"generate"}, {"advantage"}, {"evaluate"}
# Policies are measured by the engine and the rewards of training.
ENGINE, SCORE = {"generate", "evaluate"}, {"score", "evaluate"}
LENGTH = "{function: 'reward:length', weight: 0.0}"
# A judge in place of the project's function: of its own keys, what none depends on is in test_judge_stage.py.
TEACHERS = {"score", "update"}  # evaluations ask no teacher
LOADED = {"generate", "update", "evaluate"}
TRUNCATED = "generate.allow_truncated_sampling=true"
SAPO, VESPO = ["update.objective=sapo"], ["update.objective=vespo"]
JUDGE = "score.rewards=[{judge: {url: 'http://127.0.0.1:1/v1', model: m, rubric: 'Rate {response}'}}]"
# Key -> (settings that change it, stages that differ then; FIXED: the run refuses them).
TARGET = "update.entropy_target=1.0"
KEYS: dict[str, tuple[list[str], set[str] | str]] = {
    "run": ([], NOTHING),  # another run
    "iterations": (["iterations=3"], NOTHING),
    "seed": (["seed=1"], FIXED),
    "model": (["model=other"], FIXED),
    "model_options.revision": ([], FIXED),  # of the hub alone: another gives another digest of `model`
    "model_options.attn_implementation": (["model_options.attn_implementation=eager"], LOADED),
    "model_options.trust_remote_code": ([], NOTHING),  # always false
    "prompts.source": (["prompts.source=other.jsonl"], FIXED),
    "prompts.subset": (["prompts.source=owner/name", "prompts.subset=main"], FIXED),
    "prompts.split": (["prompts.source=owner/name", "prompts.split=test"], FIXED),
    "prompts.revision": (["prompts.source=owner/name", "prompts.revision=v1"], FIXED),
    "prompts.columns.prompt": (["prompts.columns.prompt=answer"], FIXED),
    "prompts.columns.messages": (["prompts.columns.messages=other"], FIXED),
    "prompts.columns.answer": (["prompts.columns.answer=other"], FIXED),
    "prompts.chat": (["prompts.chat=true"], FIXED),
    "prompts.system": (["prompts.system=Add."], FIXED),
    "prompts.chat_template": (["prompts.chat_template=my.jinja", "prompts.chat=true"], FIXED),
    "prompts.chat_template_arguments": (["prompts.chat_template_arguments={a: 1}"], FIXED),
    "prompts.on_long_prompt": (["prompts.on_long_prompt=skip"], FIXED),
    "generate.engine": (["generate.engine=transformers"], NOTHING),  # the one that `auto` takes without a GPU
    "generate.engine_options": (["generate.engine_options={dtype: float32}"], ENGINE),
    "generate.prompts_per_iteration": (["generate.prompts_per_iteration=4"], GENERATE),
    "generate.samples_per_prompt": (["generate.samples_per_prompt=3"], GENERATE),
    "generate.max_new_tokens": (["generate.max_new_tokens=5"], ENGINE),
    "generate.temperature": (["generate.temperature=0.9"], ENGINE),
    "generate.top_p": (["generate.top_p=0.9", "generate.allow_truncated_sampling=true"], ENGINE),
    "generate.top_k": (["generate.top_k=9", "generate.allow_truncated_sampling=true"], ENGINE),
    "generate.min_p": (["generate.min_p=0.1", "generate.allow_truncated_sampling=true"], ENGINE),
    "generate.repetition_penalty": (["generate.repetition_penalty=1.1", TRUNCATED], ENGINE),
    "generate.structured_outputs": (["generate.structured_outputs={regex: '[0-9]'}", TRUNCATED], ENGINE),
    "generate.stop": (["generate.stop=['.']"], ENGINE),
    "generate.allow_truncated_sampling": (["generate.allow_truncated_sampling=true"], GENERATE),
    "generate.rollouts_per_shard": (["generate.rollouts_per_shard=8"], ENGINE),
    "generate.max_rows_per_batch": (["generate.max_rows_per_batch=2"], ENGINE),  # rounding
    "generate.prompts_sql": (["generate.prompts_sql=prompts.sql"], GENERATE),
    "generate.policy_lag": (["generate.policy_lag=1"], GENERATE),
    "generate.dynamic_sampling.min_groups": (
        ["generate.dynamic_sampling={min_groups: 6, max_rounds: 2}"],
        GENERATE,
    ),
    "generate.dynamic_sampling.max_rounds": (
        ["generate.dynamic_sampling={min_groups: 6, max_rounds: 3}"],
        GENERATE,
    ),
    "score.rewards.function": (["score.rewards[0].function=reward:length"], SCORE),
    "score.rewards.model": (["score.rewards=[{model: judge}]"], SCORE),
    "score.rewards.judge.url": ([JUDGE], SCORE),
    "score.rewards.judge.model": ([JUDGE.replace("model: m", "model: other")], SCORE),
    "score.rewards.judge.rubric": ([JUDGE.replace("Rate", "Grade")], SCORE),
    "score.rewards.judge.pattern": ([JUDGE.replace("}}]", ", pattern: '([0-9])'}}]")], SCORE),
    "score.rewards.judge.grades": ([JUDGE.replace("}}]", ", grades: {A: 1.0}}}]")], SCORE),
    "score.rewards.judge.scale": ([JUDGE.replace("}}]", ", scale: [0, 10]}}]")], SCORE),
    "score.rewards.judge.temperature": ([JUDGE.replace("}}]", ", temperature: 1.0}}]")], SCORE),
    "score.rewards.judge.max_tokens": ([JUDGE.replace("}}]", ", max_tokens: 9}}]")], SCORE),
    "score.rewards.judge.extra_body": ([JUDGE.replace("}}]", ", extra_body: {top_p: 0.9}}}]")], SCORE),
    "score.rewards.judge.api_key_env": ([JUDGE.replace("}}]", ", api_key_env: KEY}}]")], SCORE),
    "score.rewards.judge.concurrency": ([JUDGE.replace("}}]", ", concurrency: 9}}]")], SCORE),
    "score.rewards.judge.requests_per_minute": (
        [JUDGE.replace("}}]", ", requests_per_minute: 9.0}}]")],
        SCORE,
    ),
    "score.rewards.judge.retries": ([JUDGE.replace("}}]", ", retries: 9}}]")], SCORE),
    "score.rewards.name": (["score.rewards[0].name=other"], SCORE),
    "score.rewards.weight": (["score.rewards[0].weight=2.0"], SCORE),
    "score.rewards.arguments": (["score.rewards[0].arguments={a: 1}"], SCORE),
    "score.rewards.timeout_s": (["score.rewards[0].timeout_s=9.0"], SCORE),
    "score.rewards.on_timeout": (["score.rewards[0].on_timeout=0.0"], SCORE),
    "score.teachers.model": (["score.teachers=[{model: other}]"], TEACHERS),
    "score.teachers.weight": (["score.teachers=[{model: other, weight: 2.0}]"], TEACHERS),
    "score.teachers.name": (["score.teachers=[{model: other, name: one}]"], TEACHERS),
    "score.on_error": (["score.on_error=drop"], NOTHING),
    "score.workers": (["score.workers=2"], NOTHING),
    "score.max_tokens_per_batch": (["score.max_tokens_per_batch=9"], NOTHING),
    "advantage.scale": (["advantage.scale=none"], ADVANTAGE),
    "advantage.epsilon": (["advantage.epsilon=0.1"], ADVANTAGE),
    "advantage.drop_zero_variance": (["advantage.drop_zero_variance=true"], ADVANTAGE),
    "advantage.truncated": (["advantage.truncated=drop"], ADVANTAGE),
    "advantage.estimator": (["advantage.estimator=rloo"], ADVANTAGE),
    "advantage.pass_k": (["advantage.estimator=pass_at_k", "advantage.pass_k=2"], ADVANTAGE),
    "advantage.max_policy_lag": (["advantage.max_policy_lag=0"], ADVANTAGE),
    "advantage.where": (["advantage.where=reward > 0"], ADVANTAGE),
    "advantage.sql": (["advantage.sql=advantage.sql"], ADVANTAGE),
    "update.objective": (["update.objective=grpo_sequence"], UPDATE),
    "update.ratio": (["update.ratio=sequence"], UPDATE),
    "update.surrogate": (["update.surrogate=cispo"], UPDATE),
    "update.clip_low": (["update.clip_low=0.1"], UPDATE),
    "update.clip_high": (["update.clip_high=0.1"], UPDATE),
    "update.delta": (["update.delta=2.0"], UPDATE),
    "update.tau_positive": ([*SAPO, "update.tau_positive=1.5"], UPDATE),
    "update.tau_negative": ([*SAPO, "update.tau_negative=1.5"], UPDATE),
    "update.ratio_cap": (["update.objective=dppo", "update.ratio_cap=5.0"], UPDATE),
    "update.k_positive": ([*VESPO, "update.k_positive=1.5"], UPDATE),
    "update.k_negative": ([*VESPO, "update.k_negative=1.5"], UPDATE),
    "update.lambda_positive": ([*VESPO, "update.lambda_positive=1.5"], UPDATE),
    "update.lambda_negative": ([*VESPO, "update.lambda_negative=1.5"], UPDATE),
    "update.aggregate": (["update.aggregate=constant"], UPDATE),
    "update.off_policy_mask": (["update.off_policy_mask=0.1"], UPDATE),
    "update.top_entropy": (["update.top_entropy=0.2"], UPDATE),
    "update.kl_coefficient": (["update.kl_coefficient=0.1"], UPDATE),
    "update.kl_estimator": (["update.kl_estimator=k2"], UPDATE),
    "update.kl_importance": (["update.kl_importance=true"], UPDATE),
    "update.entropy_coefficient": (["update.entropy_coefficient=0.1"], UPDATE),
    "update.entropy_target": (["update.entropy_target=1.0"], UPDATE),
    "update.entropy_coefficient_delta": ([TARGET, "update.entropy_coefficient_delta=0.1"], UPDATE),
    "update.entropy_coefficient_min": (
        [TARGET, "update.entropy_coefficient_min=0.1", "update.entropy_coefficient=0.1"],
        UPDATE,
    ),
    "update.entropy_coefficient_max": ([TARGET, "update.entropy_coefficient_max=0.1"], UPDATE),
    "update.old_logprobs": (["update.old_logprobs=recomputed"], UPDATE),
    "update.sampler_correction": (
        ["update.sampler_correction=mask", "update.old_logprobs=recomputed"],
        UPDATE,
    ),
    "update.sampler_correction_level": (["update.sampler_correction_level=sequence_mean"], UPDATE),
    "update.sampler_correction_cap": (["update.sampler_correction_cap=3.0"], UPDATE),
    "update.sampler_correction_floor": (
        [
            "update.sampler_correction=mask",
            "update.old_logprobs=recomputed",
            "update.sampler_correction_floor=0.5",
        ],
        UPDATE,
    ),
    "update.reference": (["update.reference=other"], FIXED),
    "update.reference_every": (["update.reference_every=5"], UPDATE),
    "update.optimizer": (["update.optimizer=adamw_8bit"], UPDATE),
    "update.learning_rate": (["update.learning_rate=0.1"], UPDATE),
    "update.min_learning_rate": (["update.schedule=linear", "update.min_learning_rate=1.0e-9"], UPDATE),
    "update.schedule": (["update.schedule=linear"], UPDATE),
    "update.warmup_steps": (["update.warmup_steps=1"], UPDATE),
    "update.warmup_share": (["update.warmup_share=0.5"], UPDATE),
    "update.betas": (["update.betas=[0.5, 0.9]"], UPDATE),
    "update.adam_epsilon": (["update.adam_epsilon=0.1"], UPDATE),
    "update.weight_decay": (["update.weight_decay=0.1"], UPDATE),
    "update.max_grad_norm": (["update.max_grad_norm=null"], UPDATE),
    "update.epochs": (["update.epochs=2"], UPDATE),
    "update.steps_per_iteration": (["update.steps_per_iteration=2"], UPDATE),
    "update.replay_iterations": (["update.replay_iterations=1"], UPDATE),
    "update.max_tokens_per_batch": (["update.max_tokens_per_batch=9"], NOTHING),
    "update.precision": (["update.precision=bfloat16"], UPDATE),
    "update.weights": (["update.precision=bfloat16", "update.weights=bfloat16_master"], UPDATE),
    "update.gradient_checkpointing": (["update.gradient_checkpointing=true"], NOTHING),
    "update.prompt_sharing": (["update.prompt_sharing='off'"], NOTHING),
    "update.lora.rank": (["update.lora={rank: 4, alpha: 8.0}"], UPDATE),
    "update.lora.alpha": (["update.lora={rank: 4, alpha: 8.0}"], UPDATE),
    "update.lora.rslora": (["update.lora={rank: 4, alpha: 8.0, rslora: true}"], UPDATE),
    "update.lora.targets": (["update.lora={rank: 4, alpha: 8.0, targets: [q_proj]}"], UPDATE),
    "update.lora.modules_to_save": (
        ["update.lora={rank: 4, alpha: 8.0, modules_to_save: [norm]}"],
        UPDATE,
    ),
    "evaluate.prompts.source": (
        ["evaluate.prompts.source=other.jsonl"],
        NOTHING,
    ),  # what is read of it counts
    "evaluate.prompts.subset": (
        ["evaluate.prompts.source=owner/name", "evaluate.prompts.subset=main"],
        EVALUATE,
    ),
    "evaluate.prompts.split": (
        ["evaluate.prompts.source=owner/name", "evaluate.prompts.split=test"],
        EVALUATE,
    ),
    "evaluate.prompts.revision": (
        ["evaluate.prompts.source=owner/name", "evaluate.prompts.revision=v1"],
        EVALUATE,
    ),
    "evaluate.prompts.columns.prompt": (["evaluate.prompts.columns.prompt=answer"], EVALUATE),
    "evaluate.prompts.columns.messages": (["evaluate.prompts.columns.messages=other"], EVALUATE),
    "evaluate.prompts.columns.answer": (["evaluate.prompts.columns.answer=other"], EVALUATE),
    "evaluate.prompts.chat": (["evaluate.prompts.chat=true"], EVALUATE),
    "evaluate.prompts.system": (["evaluate.prompts.system=Add."], EVALUATE),
    "evaluate.prompts.chat_template": (
        ["evaluate.prompts.chat_template=my.jinja", "evaluate.prompts.chat=true"],
        EVALUATE,
    ),
    "evaluate.prompts.chat_template_arguments": (
        ["evaluate.prompts.chat_template_arguments={a: 1}"],
        EVALUATE,
    ),
    "evaluate.prompts.on_long_prompt": (["evaluate.prompts.on_long_prompt=skip"], EVALUATE),
    "evaluate.every": (["evaluate.every=2"], NOTHING),
    "evaluate.samples_per_prompt": (["evaluate.samples_per_prompt=2"], EVALUATE),
    "evaluate.temperature": (["evaluate.temperature=0.5"], EVALUATE),
    "evaluate.max_new_tokens": (["evaluate.max_new_tokens=5"], EVALUATE),
    "evaluate.pass_reward": (
        [f"score.rewards=[{{function: 'reward:code'}}, {LENGTH}]", "evaluate.pass_reward=length"],
        SCORE,
    ),
    "evaluate.pass_threshold": (["evaluate.pass_threshold=2.0"], EVALUATE),
    "stop.metric": (["stop.metric=reward"], NOTHING),
    "stop.patience": (["stop.patience=1"], NOTHING),
    "stop.min_delta": (["stop.min_delta=0.5"], NOTHING),
    "checkpoints.every": (["checkpoints.every=2"], NOTHING),
    "checkpoints.keep_last": (["checkpoints.keep_last=2"], NOTHING),
    "checkpoints.keep_every": (["checkpoints.keep_every=null"], NOTHING),
    "checkpoints.keep_best": (["checkpoints.keep_best=false"], NOTHING),
    "sql_timeout_s": (["sql_timeout_s=60"], NOTHING),
    "execution.backend": (["execution={backend: ray}"], NOTHING),
    "execution.address": (["execution={backend: ray, address: local}"], NOTHING),
    "execution.engines.count": (["execution={engines: {count: 2}}"], NOTHING),
    "execution.engines.gpus": (["execution={backend: ray, engines: {gpus: 1}}"], NOTHING),
    "execution.engines.timeout_s": (["execution={engines: {timeout_s: 60}}"], NOTHING),
    "execution.scorers.count": (["execution={scorers: {count: 2}}"], NOTHING),
    "execution.scorers.gpus": (["execution={backend: ray, scorers: {gpus: 1}}"], NOTHING),
    "execution.learner.processes": (["execution={learner: {processes: 2}}"], NOTHING),
    "execution.learner.replicas": (["execution={learner: {processes: 4, replicas: 2}}"], NOTHING),
    "execution.learner.gpus": (["execution={backend: ray, learner: {processes: 2, gpus: 1}}"], NOTHING),
    "execution.weights": (["execution={engines: {}, weights: memory}"], NOTHING),
    "execution.placement": (["execution={placement: apart}"], NOTHING),
    "artifacts.mirror": (["artifacts.mirror=s3://bucket/runs"], NOTHING),
    "track": (["track=trackio"], NOTHING),
}


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key below a section, sections in lists and optional ones included."""
    found = []
    for name, field in model.model_fields.items():
        sections = [t for t in flat(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        found += keys_of(sections[0], f"{prefix}{name}.") if sections else [f"{prefix}{name}"]
    return found


def flat(annotation: object) -> list[object]:
    """A type and all that it is made of."""
    parts = getattr(annotation, "__args__", ())
    return [annotation, *(inner for part in parts for inner in flat(part))]


def test_every_key_is_classified() -> None:
    assert keys_of(Config) == list(KEYS)


@pytest.fixture(scope="module")
def settled(complete_and_measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A measured project with the files that the settings above name; no test changes it."""
    folder = Path(shutil.copytree(complete_and_measured, tmp_path_factory.mktemp("settled") / "project"))
    for name in ("judge", "other"):
        shutil.copytree(folder / "model", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "changed": True}))
    (folder / "other.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (folder / "my.jinja").write_text("{{ messages[0].content }}")
    (folder / "prompts.sql").write_text("select prompt_id from prompts order by prompt_id")
    (folder / "advantage.sql").write_text(
        "select iteration, group_id, sample_id, reward as advantage from advantages"
    )
    before = crash.contents(folder)
    yield folder
    assert crash.contents(folder) == before


@pytest.mark.parametrize("key", [key for key, (settings, _) in KEYS.items() if settings])
def test_exactly_the_expected_stages_differ(
    settled: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, key: str
) -> None:
    monkeypatch.chdir(settled)
    settings, expected = KEYS[key]
    options = [part for setting in settings for part in ("--set", setting)]
    if expected == FIXED:
        code, _, err = grpo("run", *options)
        assert (code, FIXED in err) == (4, True), err
        return
    assert isinstance(expected, set)
    code, out, err = grpo("status", "--json", *options)
    assert code == 0, err
    for row in json.loads(out)["iterations"]:
        differing = {name for name, stage in row["stages"].items() if stage["state"] != "done"}
        assert differing == expected - EVALUATE, row
    for row in json.loads(out)["evaluations"]:
        assert row["state"] == ("changed" if "evaluate" in expected else "done"), row
