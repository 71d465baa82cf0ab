import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from grpo.config import (
    AdvantageConfig,
    Config,
    LoraConfig,
    RewardConfig,
    UpdateConfig,
    differing_keys,
    flatten,
    load,
    overridden_keys,
)
from grpo.config.objectives import OBJECTIVES
from grpo.config.section import ADDED, Section
from grpo.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
SMALLEST = """\
run: small
model: ./model
prompts: {source: arithmetic}
score:
  rewards:
    - {function: exact_answer}
"""
HINT = "expected key=value, such as --set update.learning_rate=1e-6"

Load = Callable[..., Config]
Refuse = Callable[..., str]


@pytest.fixture(name="load_text")
def _load_text(tmp_path: Path) -> Load:
    """load_text(text or bytes, override, ...): the configuration that a file of this text gives."""

    def load_text(text: str | bytes = SMALLEST, *overrides: str) -> Config:
        path = tmp_path / "pipeline.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path, list(overrides))

    return load_text


@pytest.fixture
def refusal(load_text: Load, tmp_path: Path) -> Refuse:
    """Like load_text, for what must be refused with exit 2: the message, without the folder."""

    def refuse(text: str | bytes = SMALLEST, *overrides: str) -> str:
        with pytest.raises(UsageError) as caught:
            load_text(text, *overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refuse


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [a\nmodel: m\n", "pipeline.yaml:2:6: expected ',' or ']', but got ':'"),
        (
            "run: r\n\tmodel: m\n",
            "pipeline.yaml:2:1: found character '\\t' that cannot start any token; use spaces, not tabs",
        ),
        (
            "run: r\nscore:\n\tworkers: 1\n",
            "pipeline.yaml:3:1: found character '\\t' that cannot start any token; use spaces, not tabs",
        ),
        ("run: r\nmodel: a\x07b\n", "pipeline.yaml:2:9: control character U+0007 in the text"),
        ("run: r\nmodel: a\0b\n", "pipeline.yaml:2:9: control character U+0000 in the text"),
        (b"run: r\nmodel: caf\xe9\n", "pipeline.yaml:2:11: not UTF-8; save the file as UTF-8"),
        (
            "run: r\nmodel: a\nrun: s\n",
            'pipeline.yaml:3:1: found duplicate key "run" with value "s" (original value: "r")',
        ),
        (
            "generate: {seed: 1, seed: 2}\n",
            'pipeline.yaml:1:21: found duplicate key "seed" with value "2" (original value: "1")',
        ),
        ("run: r\n  model: m\n", "pipeline.yaml:2:8: mapping values are not allowed here"),
        (
            "model: !!python/object:os.system x\n",
            "pipeline.yaml:1:8: unknown tag tag:yaml.org,2002:python/object:os.system",
        ),
        ("seed: !!int x\n", "pipeline.yaml:1:7: cannot be read as int: x"),
        ("a: 1\n2: b\n", "pipeline.yaml:2:1: a key must be text; put it in quotes"),
        ("", "pipeline.yaml: run: is required and missing (and 3 more)"),
        ("- a\n", 'pipeline.yaml: expected a section with keys, found ["a"]'),
        ("hello\n", 'pipeline.yaml: expected a section with keys, found "hello"'),
    ],
)
def test_malformed_yaml(refusal: Refuse, text: str | bytes, message: str) -> None:
    assert refusal(text) == message


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: no such file; give a configuration with -c FILE"


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf" + SMALLEST.encode(), SMALLEST.replace("\n", "\r\n")])
def test_a_byte_order_mark_and_crlf_just_work(load_text: Load, text: str | bytes) -> None:
    assert load_text(text) == load_text(SMALLEST)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.sample_per_prompt=4", "unknown key; did you mean samples_per_prompt?"),
        ("prompts.columns.promt=q", "unknown key; did you mean prompt?"),
        ("score.rewards[0].weigth=1", "unknown key; did you mean weight?"),
        ("generate.resample=null", "unknown key; did you mean dynamic_sampling?"),  # its former name
        ("checkpoints.zzz=1", "unknown key; known keys: every, keep_last, keep_every, keep_best"),
        ("update=null", "expected a section with keys, found null"),
        ("score.rewards={a: 1}", "expected a list"),
        ("generate.samples_per_prompt=true", "expected a whole number, found true"),
        ("generate.samples_per_prompt=8.5", "expected a whole number, found 8.5"),
        ("generate.samples_per_prompt='8'", 'expected a whole number, found "8"'),
        ("generate.samples_per_prompt=1", "expected at least 2, found 1"),
        ("generate.temperature=true", "expected a number, found true"),
        ("generate.temperature=.nan", "expected a finite number, found NaN"),
        ("generate.temperature=.inf", "expected a finite number, found Infinity"),
        ("generate.temperature=0", "expected at least 0.01, found 0"),
        ("generate.temperature=0.001", "expected at least 0.01, found 0.001"),
        ("generate.temperature=null", "expected a number, found null"),
        ("generate.top_p=0", "expected more than 0, found 0"),
        ("generate.top_p=1.1", "expected at most 1, found 1.1"),
        ("generate.top_k=0", "expected at least 1, found 0; write null: from all"),
        ("generate.min_p=1", "expected less than 1, found 1"),
        ("generate.min_p=-0.1", "expected at least 0, found -0.1"),
        ("generate.engine_options=[]", "expected a mapping (key: value)"),
        ("generate.engine=VLLM", 'expected one of auto, transformers, vllm, found "VLLM"'),
        ("score.rewards[0].weight=-.inf", "expected a finite number, found -Infinity"),
        ("score.rewards=[]", "expected at least 1 item, found 0"),
        ("score.rewards[0].timeout_s=1e7", "expected at most 1000000, found 10000000.0"),
        ("score.workers=100000", "expected at most 1024, found 100000"),
        (
            "generate.prompts_per_iteration=2000000",
            "expected at most 1048576, found 2000000",
        ),
        ("update.learning_rate=-1e-6", "expected at least 0, found -1e-06"),
        ("update.learning_rate=.nan", "expected a finite number, found NaN"),
        ("update.learning_rate=.inf", "expected a finite number, found Infinity"),
        ("update.clip_low=1.5", "expected at most 1, found 1.5"),
        ("update.delta=1", "expected more than 1, found 1"),
        ("update.entropy_coefficient=-1", "expected at least 0, found -1"),
        ("update.warmup_steps=-1", "expected at least 0, found -1"),
        ("update.schedule=step", 'expected one of constant, linear, cosine, found "step"'),
        ("update.precision=float16", 'expected one of auto, float32, bfloat16, found "float16"'),
        ("update.prompt_sharing=on", 'expected one of auto, off, found "on"'),
        (
            "update.surrogate=clp",
            'no such surrogate; did you mean clip? (a function of your own is module:function), found "clp"',
        ),
        (
            "update.surrogate=my_loss.py:f",
            "no such surrogate; there are clip, cispo, sapo, gmpo, dppo_tv, dppo_kl, vespo (a function of"
            ' your own is module:function), found "my_loss.py:f"',
        ),
        ("update.surrogate=null", "expected text, found null"),
        ("update.clip_high=1e39", "expected at most 1000000, found 1e+39"),
        ("update.delta=1e39", "expected at most 1000000, found 1e+39"),
        ("update.kl_coefficient=1e39", "expected at most 1000000, found 1e+39"),
        ("update.entropy_coefficient=1e39", "expected at most 1000000, found 1e+39"),
        ("update.sampler_correction_cap=1e39", "expected at most 1000000, found 1e+39"),
        ("update.epochs=1000000000", "expected at most 1000, found 1000000000"),
        (
            "update.steps_per_iteration=9999999",
            "expected at most 1048576, found 9999999",
        ),
        (
            "update.warmup_steps=2147483648",
            "expected less than 2147483648, found 2147483648",
        ),
        ("update.lora=8", "expected a section with keys, found 8"),
        ("update.betas=[0.9]", "expected at least 2 items, found 1"),
        ("checkpoints.keep_last=0", "expected at least 1, found 0"),
        ("iterations=-1", "expected at least 1, found -1"),
        ("iterations=2147483648", "expected less than 2147483648, found 2147483648"),
        ("seed=-1", "expected at least 0, found -1"),
        ("prompts.chat=1", "expected true or false, found 1"),
        ("run=../x", 'expected at most 64 letters, digits, . _ -, a letter or digit first, found "../x"'),
        ("run=..", 'expected at most 64 letters, digits, . _ -, a letter or digit first, found ".."'),
    ],
)
def test_a_wrong_value_names_its_key(refusal: Refuse, override: str, message: str) -> None:
    key = override.partition("=")[0]
    assert refusal(SMALLEST, override) == f"--set {key}: {message}"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{}", "rank: is required and missing (and 1 more)"),
        ("{rank: 0, alpha: 1}", "rank: expected at least 1, found 0"),
        ("{rank: 100000, alpha: 1}", "rank: expected at most 16384, found 100000"),
        ("{rank: 8, alpha: 1e39}", "alpha: expected at most 1000000, found 1e+39"),
        ("{rank: 8, alpha: 0}", "alpha: expected more than 0, found 0"),
        ("{rank: 8, alpha: 16, target: [a]}", "target: unknown key; did you mean targets?"),
        (
            "{rank: 8, alpha: 16, targets: []}",
            "targets: expected at least 1 item, found 0",
        ),
        (
            "{rank: 8, alpha: 16, targets: q_proj}",
            'targets: expected a list, found "q_proj"; write a list, such as [q_proj, v_proj]',
        ),
        (
            "{rank: 8, alpha: 16, targets: ['']}",
            'targets[0]: expected text that is not empty, found ""',
        ),
    ],
)
def test_a_wrong_adapter(refusal: Refuse, lora: str, message: str) -> None:
    assert refusal(SMALLEST, f"update.lora={lora}") == f"--set update.lora.{message}"


def test_an_adapter_has_a_section_of_its_own(load_text: Load) -> None:
    assert load_text().update.lora is None
    config = load_text(SMALLEST, "update.lora={rank: 8, alpha: 16, targets: [q_proj, v_proj]}")
    assert config.update.lora == LoraConfig(rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
    assert flatten(config.model_dump())["update.lora.alpha"] == 16.0
    assert Config.model_validate(json.loads(json.dumps(config.model_dump()))) == config
    every_layer = load_text(SMALLEST, "update.lora={rank: 1, alpha: 0.5}").update.lora
    assert every_layer is not None
    assert every_layer.targets is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("true", True), ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y")],
        *[("null", None), ("~", None), ("1_000", 1000), ("0777", 777), ("0o17", 15), ("0x1F", 31)],
        *[("1e-6", 1e-6), ("-.5", -0.5), ("1.", 1.0), ("1:20", "1:20"), ("2026-01-31", "2026-01-31")],
        *[("=", "="), ("'1'", "1"), ("!!str 1", "1"), ("${seed}", "${seed}"), ("a b # c", "a b")],
        *[("[1, [a]]", [1, ["a"]]), ("{yes: 1, no: {}}", {"yes": 1, "no": {}}), ("'a\tb'", "a\tb")],
    ],
)
def test_values_are_those_of_yaml_1_2(load_text: Load, text: str, value: object) -> None:
    block = SMALLEST.replace("{function: exact_answer}", f"function: f\n      arguments:\n        x: {text}")
    for config in (load_text(block), load_text(SMALLEST, f"score.rewards[0].arguments.x={text}")):
        found = config.score.rewards[0].arguments["x"]
        assert (found, type(found)) == (value, type(value))


def test_anchors_and_merged_mappings(load_text: Load) -> None:
    text = SMALLEST.replace("exact_answer", "f, name: a, arguments: &x {low: 1, high: [2]}")
    text += "    - {function: f, name: b, arguments: {<<: *x, low: 3}}\n"
    text += "    - {function: f, name: c, arguments: *x}\n"
    rewards = load_text(text).score.rewards
    assert rewards[1].arguments == {"low": 3, "high": [2]}
    assert rewards[2].arguments == rewards[0].arguments == {"low": 1, "high": [2]}


def test_a_wrong_item_of_a_list_names_its_place(refusal: Refuse) -> None:
    message = "--set update.betas[1]: expected less than 1, found 1.0"
    assert refusal(SMALLEST, "update.betas=[0.9, 1.0]") == message


def test_several_problems_are_counted(refusal: Refuse) -> None:
    message = "--set seed: expected at least 0, found -1 (and 1 more)"
    assert refusal(SMALLEST, "seed=-1", "generate.temperature=-1") == message


def test_a_warm_up_longer_than_the_run(refusal: Refuse, load_text: Load) -> None:
    # 3 iterations of 2 epochs of 2 steps are 12.
    run = ("iterations=3", "update.epochs=2", "update.steps_per_iteration=2")
    assert load_text(SMALLEST, *run, "update.warmup_steps=12").update.warmup_steps == 12
    assert refusal(SMALLEST, *run, "update.warmup_steps=13") == (
        "pipeline.yaml with --set: update.warmup_steps: 13 are more than the 12 optimiser steps of the run"
        " (iterations * update.epochs * update.steps_per_iteration); lower it, or raise `iterations`"
    )


def test_an_unknown_key_is_named_before_what_is_missing_because_of_it(refusal: Refuse) -> None:
    message = "update.lora.rang: unknown key; did you mean rank? (and 1 more)"
    assert refusal(SMALLEST, "update.lora={rang: 8, alpha: 16}") == f"--set {message}"
    assert refusal(SMALLEST + "update: {lora: {rang: 8, alpha: 16}}") == f"pipeline.yaml: {message}"


def test_an_error_says_whether_the_value_is_from_the_file(refusal: Refuse) -> None:
    bad = SMALLEST + "update: {epochs: 0}\n"
    assert refusal(bad, "seed=1").startswith("pipeline.yaml: update.epochs:")
    assert refusal(bad, "update.epochs=-1").startswith("--set update.epochs:")
    assert refusal(bad, "update={epochs: -1}").startswith("--set update.epochs:")
    assert refusal(SMALLEST, "score.rewards.0.weight=x").startswith("--set score.rewards[0].weight:")


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[{}]", "score.rewards[0]: exactly one of function, model and judge must be given"),
        ("[x]", 'score.rewards[0]: expected a section with keys, found "x"'),
        (
            "[{function: a, model: b}]",
            "score.rewards[0]: exactly one of function, model and judge must be given",
        ),
        (
            "[{model: b, arguments: {x: 1}}]",
            "score.rewards[0]: arguments are for functions; a reward model takes none",
        ),
        (
            "[{function: 'm:a'}, {model: dir/a}]",
            "score.rewards: two rewards are named a; give one of them another `name`",
        ),
    ],
)
def test_contradictory_rewards(refusal: Refuse, rewards: str, message: str) -> None:
    assert refusal(SMALLEST, f"score.rewards={rewards}") == f"--set {message}"


@pytest.mark.parametrize("value", [".nan", "-.inf", "[{b: .inf}]"])
def test_arguments_are_what_json_can_hold(refusal: Refuse, value: str) -> None:
    allowed = "may hold text, finite numbers, true, false, null, lists and mappings by text"
    message = f"--set score.rewards[0].arguments: {allowed}"
    assert refusal(SMALLEST, f"score.rewards[0].arguments={{x: {value}}}") == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", HINT),
        ("score.rewards[0.weight=7", HINT),
        ("rewards]0[.weight=7", HINT),
        ("k=", HINT),
        ("model= ", HINT),
        ("=v", HINT),
        ("seed=a: b", "mapping values are not allowed here"),
        ("score.rewards[3].weight=1", "item 3 of a list of 1; the first is 0"),
        ("score.rewards[x].weight=1", "item x of a list of 1; the first is 0"),
        ("seed={1: a}", "a key must be text; put it in quotes"),
        ("seed=!!binary aGVsbG8=", "unknown tag tag:yaml.org,2002:binary"),
    ],
)
def test_set_that_cannot_be_read(refusal: Refuse, override: str, message: str) -> None:
    assert refusal(SMALLEST, override) == f"--set {override}: {message}"


def test_set_is_applied_in_order_and_a_list_replaces_the_whole_list(load_text: Load) -> None:
    config = load_text(
        SMALLEST, "seed=1", "seed=2", "score.rewards=[{function: gsm8k}, {function: 'm:f', name: g}]"
    )
    assert config.seed == 2
    assert [reward.name for reward in config.score.rewards] == ["gsm8k", "g"]
    again = load_text(SMALLEST, "score.rewards=[{function: gsm8k}]", "score.rewards[0].weight=0.5")
    assert [(reward.name, reward.weight) for reward in again.score.rewards] == [("gsm8k", 0.5)]
    assert load_text(SMALLEST, "update.betas=[0.5, 0.6]").update.betas == [0.5, 0.6]


def test_set_of_a_section_replaces_the_section(load_text: Load) -> None:
    text = SMALLEST + "generate: {max_new_tokens: 5}\n"
    generate = load_text(text, "generate={temperature: 0.5}").generate
    assert (generate.max_new_tokens, generate.temperature) == (128, 0.5)


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E-6", 1e-6), ("2.0e-4", 2e-4), ("1", 1.0)])
def test_exponents_are_numbers(load_text: Load, text: str, value: float) -> None:
    assert load_text(SMALLEST, f"update.learning_rate={text}").update.learning_rate == value
    assert load_text(SMALLEST + f"update: {{learning_rate: {text}}}\n").update.learning_rate == value


def test_an_objective_sets_its_keys(load_text: Load) -> None:
    grpo = load_text().update
    assert (grpo.ratio, grpo.aggregate, grpo.kl_estimator) == ("token", "sequence_mean", "k3")
    sequence = load_text(SMALLEST, "update.objective=grpo_sequence")
    update = sequence.update
    assert (update.ratio, update.aggregate, update.kl_estimator) == ("sequence", "sequence_sum", "k1")
    assert (update.clip_low, update.clip_high, update.kl_coefficient) == (0.2, 0.2, 0.01)
    assert (update.old_logprobs, sequence.advantage.scale) == ("recomputed", "group")
    assert overridden_keys(sequence) == []


# ratio, surrogate, clip_low, clip_high, aggregate, kl_coefficient, kl_estimator, old_logprobs | advantage.
TABLE = {
    "grpo": ("token", "clip", 0.2, 0.2, "sequence_mean", 0.01, "k3", "sampled", "group", False),
    "grpo_sequence": ("sequence", "clip", 0.2, 0.2, "sequence_sum", 0.01, "k1", "recomputed", "group", False),
    "dr_grpo": ("token", "clip", 0.2, 0.2, "constant", 0.0, "k3", "sampled", "none", False),
    "dapo": ("token", "clip", 0.2, 0.28, "token_mean", 0.0, "k3", "sampled", "group", True),
    "gspo": ("sequence_mean", "clip", 3e-4, 4e-4, "sequence_mean", 0.0, "k3", "recomputed", "group", False),
    "cispo": ("token", "cispo", None, 4.0, "token_mean", 0.0, "k3", "sampled", "group", False),
    "sapo": ("token", "sapo", None, None, "sequence_mean", 0.0, "k3", "sampled", "group", False),
    "gmpo": ("sequence_mean", "gmpo", 0.4, 0.4, "sequence_mean", 0.0, "k3", "sampled", "group", False),
    "dppo": ("token", "dppo_tv", 0.2, 0.2, "token_mean", 0.0, "k3", "sampled", "group", False),
    "vespo": ("token", "vespo", None, None, "token_mean", 0.0, "k3", "sampled", "group", False),
    "scalerl": ("token", "cispo", None, 4.0, "prompt_mean", 0.0, "k3", "sampled", "batch", True),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_objective_sets_the_same_keys(load_text: Load, name: str) -> None:
    assert list(TABLE) == list(OBJECTIVES)
    keys = list(flatten(OBJECTIVES["grpo"]))
    assert list(flatten(OBJECTIVES[name])) == keys
    config = load_text(SMALLEST, f"update.objective={name}")
    values = flatten(config.model_dump())
    assert tuple(values[key] for key in keys) == TABLE[name]
    assert overridden_keys(config) == []


def test_the_first_objective_is_what_the_fields_have_by_default() -> None:
    assert {key: UpdateConfig.model_fields[key].default for key in OBJECTIVES["grpo"]["update"]} == (
        OBJECTIVES["grpo"]["update"]
    )
    advantage = AdvantageConfig().model_dump()
    assert {key: advantage[key] for key in OBJECTIVES["grpo"]["advantage"]} == OBJECTIVES["grpo"]["advantage"]


CLIPS = "clip or cispo or gmpo or dppo_tv or dppo_kl"
# objective, its surrogate, a key that it does not read, what reads it.
UNREAD = [
    ("sapo", "sapo", "clip_low", CLIPS, ", or set it to null"),
    ("vespo", "vespo", "clip_high", CLIPS, ", or set it to null"),
    ("grpo", "clip", "tau_positive", "sapo", ""),
    ("gmpo", "gmpo", "tau_negative", "sapo", ""),
    ("sapo", "sapo", "k_positive", "vespo", ""),
    ("dppo", "dppo_tv", "k_negative", "vespo", ""),
    ("scalerl", "cispo", "lambda_positive", "vespo", ""),
    ("grpo", "clip", "lambda_negative", "vespo", ""),
]


@pytest.mark.parametrize("surrogate", ["sapo", "my_loss:surrogate"])
def test_a_surrogate_that_does_not_clip_needs_no_word_about_it(load_text: Load, surrogate: str) -> None:
    config = load_text(SMALLEST, f"update.surrogate={surrogate}")
    assert (config.update.clip_low, config.update.clip_high) == (None, None)
    changed = [line.partition(":")[0] for line in overridden_keys(config)]
    assert changed == ["update.surrogate", "update.clip_low", "update.clip_high"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["min_learning_rate=1e-8"],
            "min_learning_rate: 1e-08 is where a schedule ends; set schedule: linear or",
        ),
        (
            ["schedule=linear", "learning_rate=1e-6", "min_learning_rate=1e-5"],
            "min_learning_rate: 1e-05 must be at most learning_rate: 1e-06, where the schedule begins",
        ),
        (
            ["warmup_share=0.1", "warmup_steps=3"],
            "warmup_share: 0.1 and warmup_steps: 3 say the same thing; give",
        ),
        (
            ["sampler_correction_floor=0.5"],
            "sampler_correction_floor: 0.5 bounds the weight of a sampler_corr",
        ),
        (
            ["weights=bfloat16_master", "precision=float32"],
            "weights: bfloat16_master computes in bfloat16, found precision: float32; set",
        ),
        (
            ["weights=bfloat16_master", "precision=bfloat16", "lora={rank: 2, alpha: 4}"],
            "weights: bfloat16_master is for weights that train, and under lora they do not; leave one",
        ),
    ],
)
def test_a_bound_without_effect_is_refused(refusal: Refuse, overrides: list[str], message: str) -> None:
    found = refusal(SMALLEST, *(f"update.{override}" for override in overrides))
    assert found.startswith(f"pipeline.yaml with --set: update: {message}")


@pytest.mark.parametrize("every", ["auto", 1, 7, "1m", "15m", "1440m"])
def test_how_often_a_policy_is_written(load_text: Load, every: str | int) -> None:
    assert load_text(SMALLEST, f"checkpoints.every={every}").checkpoints.every == every


NEVER = ["0", "-3", "2147483648", "true", "1.5", "null", "'15'", "0m", "15 m", "15s", "[1]"]


@pytest.mark.parametrize("every", NEVER)
def test_what_says_in_no_way_how_often(refusal: Refuse, every: str) -> None:
    expected = "expected auto, a number of iterations from 1, or minutes from 1m to 999999m"
    assert refusal(SMALLEST, f"checkpoints.every={every}").startswith(f"--set checkpoints.every: {expected}")


def test_keys_that_came_later_are_in_no_fingerprint_at_their_default(load_text: Load) -> None:
    added = [name for name, field in UpdateConfig.model_fields.items() if ADDED in field.metadata]
    assert len(added) >= 9
    assert set(added) & set(load_text().update.recorded()) == set()
    assert load_text(SMALLEST, "update.top_entropy=0.2").update.recorded()["top_entropy"] == 0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective=cispo", "ratio=sequence"],
            "surrogate: cispo weighs tokens, found ratio: sequence; set ratio: token",
        ),
        (
            ["surrogate=cispo", "delta=4"],
            "delta: 4.0 is for surrogate: clip; the clip_high of cispo caps the ratio for advantages of both"
            " signs: leave delta out",
        ),
        (
            ["delta=1.2"],
            "delta: 1.2 must be greater than 1 + clip_high = 1.2, where the ratio of a positive advantage is"
            " already clipped",
        ),
        (
            ["objective=dapo", "delta=1.25"],
            "delta: 1.25 must be greater than 1 + clip_high = 1.28, where the ratio of a positive advantage"
            " is already clipped",
        ),
        (
            ["surrogate=gmpo"],
            "surrogate: gmpo is a geometric mean over the response, found ratio: token; set ratio:"
            " sequence_mean",
        ),
        (
            ["objective=gspo", "surrogate=vespo"],
            "surrogate: vespo weighs tokens, found ratio: sequence_mean; set ratio: token",
        ),
        *(
            (
                [f"objective={objective}", f"{key}=0.5"],
                f"{key}: 0.5 is for surrogate: {readers}; {surrogate} does not read it: leave {key}"
                f" out{null}",
            )
            for objective, surrogate, key, readers, null in UNREAD
        ),
        (
            ["surrogate=my_loss:surrogate", "clip_high=0.3"],
            "clip_high: 0.3 is for surrogate: clip or cispo or gmpo or dppo_tv or dppo_kl; my_loss:surrogate"
            " does not read it: leave clip_high out, or set it to null",
        ),
        (
            ["objective=gmpo", "top_entropy=0.2"],
            "ratio: sequence_mean has one surrogate value per rollout, of which no token can be left out;"
            " leave top_entropy out, or set ratio: token",
        ),
    ],
)
def test_a_surrogate_that_does_not_fit(refusal: Refuse, overrides: list[str], message: str) -> None:
    found = refusal(SMALLEST, *(f"update.{override}" for override in overrides))
    assert found == f"pipeline.yaml with --set: update: {message}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["delta=1.21"], ("clip", 0.2, 1.21)),
        (["clip_high=null", "delta=1.01"], ("clip", None, 1.01)),
        (["surrogate=cispo"], ("cispo", 0.2, None)),
        (["objective=gspo", "delta=1.001"], ("clip", 4e-4, 1.001)),
    ],
)
def test_a_surrogate_that_fits(
    load_text: Load, overrides: list[str], expected: tuple[str, float | None, float | None]
) -> None:
    update = load_text(SMALLEST, *(f"update.{override}" for override in overrides)).update
    assert (update.surrogate, update.clip_high, update.delta) == expected


def test_a_key_of_the_user_wins_over_the_objective_and_so_does_null(load_text: Load) -> None:
    config = load_text(
        SMALLEST,
        "update.objective=grpo_sequence",
        "update.clip_low=null",
        "update.ratio=token",
        "advantage.scale=none",
    )
    assert (config.update.clip_low, config.update.ratio, config.advantage.scale) == (None, "token", "none")
    assert (config.update.clip_high, config.update.kl_estimator) == (0.2, "k1")
    assert overridden_keys(config) == [
        'update.ratio: "token" (objective grpo_sequence: "sequence")',
        "update.clip_low: null (objective grpo_sequence: 0.2)",
        'advantage.scale: "none" (objective grpo_sequence: "group")',
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("none", "token", 2.0)),
        (["sampler_correction=mask", "old_logprobs=recomputed"], ("mask", "token", 2.0)),
        (["sampler_correction_level=sequence_mean"], ("none", "sequence_mean", 1.01)),
        (
            ["sampler_correction_level=sequence_mean", "sampler_correction_cap=3"],
            ("none", "sequence_mean", 3.0),
        ),
        (["sampler_correction_cap=1.5"], ("none", "token", 1.5)),
        (
            [
                "objective=grpo_sequence",
                "sampler_correction=truncate",
                "sampler_correction_level=sequence_mean",
            ],
            ("truncate", "sequence_mean", 1.01),
        ),
    ],
)
def test_the_cap_of_the_sampler_correction_follows_its_level(
    load_text: Load, overrides: list[str], expected: tuple[str, str, float]
) -> None:
    config = load_text(SMALLEST, *(f"update.{override}" for override in overrides))
    resolved = config.model_dump()["update"]  # what run.json shows
    names = ("sampler_correction", "sampler_correction_level", "sampler_correction_cap")
    assert tuple(resolved[name] for name in names) == expected
    assert Config.model_validate(json.loads(json.dumps(config.model_dump()))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampler_correction=truncate"],
            "update: sampler_correction: truncate needs old_logprobs: recomputed; with sampled the ratio"
            " itself is to the sampler, and a weight of 1 is right: sampler_correction: none",
        ),
        (
            ["objective=grpo_sequence", "sampler_correction=mask"],
            "update: ratio: sequence has one surrogate value per rollout, which weights per token do not fit;"
            " set sampler_correction_level: sequence_mean",
        ),
        (
            ["ratio=sequence_mean", "sampler_correction=truncate", "old_logprobs=recomputed"],
            "update: ratio: sequence_mean has one surrogate value per rollout, which weights per token do not"
            " fit; set sampler_correction_level: sequence_mean",
        ),
        (
            ["sampler_correction_cap=1"],
            "update.sampler_correction_cap: expected more than 1, found 1",
        ),
        (
            ["sampler_correction_cap=null"],
            "update.sampler_correction_cap: expected a number, found null",
        ),
        (
            ["sampler_correction_level=sequence"],
            'update.sampler_correction_level: expected one of token, sequence_mean, found "sequence";'
            " write sequence_mean, the geometric mean",
        ),
        (["sampler_correction_level=[]"], None),
    ],
)
def test_a_sampler_correction_that_does_not_fit(
    refusal: Refuse, overrides: list[str], message: str | None
) -> None:
    found = refusal(SMALLEST, *(f"update.{override}" for override in overrides))
    expected = message or "update.sampler_correction_level: expected one of token, sequence_mean"
    where = "pipeline.yaml with --set: " if expected.startswith("update: ") else "--set "
    assert found == f"{where}{expected}"


@pytest.mark.parametrize("override", ["top_p=0.9", "top_k=5", "min_p=0.1"])
def test_a_cut_distribution_has_to_be_allowed_and_needs_vllm(
    load_text: Load, refusal: Refuse, override: str
) -> None:
    key = override.partition("=")[0]
    wanted = f"generate.{override}"
    assert refusal(SMALLEST, wanted) == (
        f"pipeline.yaml with --set: generate: {key} cuts the distribution the policy is sampled from, which"
        " biases the importance ratio; leave it out, or set allow_truncated_sampling: true"
    )
    allowed = "generate.allow_truncated_sampling=true"
    assert refusal(SMALLEST, wanted, allowed, "generate.engine=transformers") == (
        f"pipeline.yaml with --set: generate: {key} needs engine: vllm; the built-in engine samples from all"
        " tokens"
    )
    for engine in ("vllm", "auto"):
        generate = load_text(SMALLEST, wanted, allowed, f"generate.engine={engine}").generate
        assert generate.model_dump()[key] == float(override.partition("=")[2])


def test_the_whole_distribution_needs_no_leave(load_text: Load) -> None:
    written = ("generate.top_p=1", "generate.top_k=null", "generate.min_p=0")
    assert load_text(SMALLEST, *written) == load_text()
    generate = load_text().generate
    assert (generate.top_p, generate.top_k, generate.min_p) == (1.0, None, 0.0)
    assert not generate.allow_truncated_sampling


def test_engine_options_are_what_json_can_hold(load_text: Load, refusal: Refuse) -> None:
    options = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "compilation_config": {"level": 0},
        "quantization": None,
    }
    config = load_text(SMALLEST, f"generate.engine_options={json.dumps(options)}")
    assert config.generate.engine_options == options
    assert load_text().generate.engine_options == {}
    for value in ("{seed: .nan}", "{deep: [.inf]}"):
        message = refusal(SMALLEST, f"generate.engine_options={value}")
        assert message == (
            "--set generate.engine_options:"
            " may hold text, finite numbers, true, false, null, lists and mappings by text"
        )


def test_the_name_of_a_reward_follows_from_what_it_is(load_text: Load) -> None:
    rewards = "[{function: gsm8k}, {function: 'a.b:c'}, {model: org/judge}, {model: dir/d/}]"
    config = load_text(SMALLEST, f"score.rewards={rewards}")
    assert [reward.name for reward in config.score.rewards] == ["gsm8k", "c", "judge", "d"]


@pytest.mark.parametrize("overrides", [[], ["update.objective=grpo_sequence", "update.clip_high=null"]])
def test_the_resolved_configuration_comes_back_from_json(load_text: Load, overrides: list[str]) -> None:
    arguments = "score.rewards[0].arguments={low: -1, words: [a, b], deep: {x: null}}"
    config = load_text(SMALLEST, arguments, "update.learning_rate=1e-6", *overrides)
    assert Config.model_validate(json.loads(json.dumps(config.model_dump()))) == config


def test_a_configuration_is_immutable(load_text: Load) -> None:
    config = load_text()
    with pytest.raises(ValueError, match="Instance is frozen"):
        config.seed = 1  # type: ignore[misc]


def test_the_shipped_file_loads() -> None:
    config = load(REPOSITORY / "pipeline.yaml")
    assert (config.run, config.model, config.prompts.source) == (
        "quickstart",
        "tiny-arithmetic",
        "arithmetic",
    )
    assert (config.iterations, config.generate.samples_per_prompt) == (60, 8)
    assert (config.update.learning_rate, config.update.betas) == (2e-4, [0.9, 0.95])
    assert [reward.name for reward in config.score.rewards] == ["exact_answer"]
    assert overridden_keys(config) == []


def test_defaults_are_those_of_the_note(load_text: Load) -> None:
    config = load_text()
    assert (config.generate.samples_per_prompt, config.generate.max_new_tokens) == (4, 128)
    assert (config.update.clip_low, config.update.clip_high, config.update.kl_coefficient) == (0.2, 0.2, 0.01)
    assert (config.generate.temperature, config.advantage.epsilon) == (1.0, 1e-4)
    assert (config.update.betas, config.update.weight_decay) == ([0.9, 0.999], 0.0)
    assert (config.update.learning_rate, config.update.max_grad_norm) == (5e-7, 1.0)


def test_every_field_says_what_it_means() -> None:
    def undescribed(model: type[BaseModel]) -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undescribed(field.annotation)  # a section is described by its class
            elif not field.description:
                names.append(f"{model.__name__}.{name}")
        return names

    assert undescribed(Config) + undescribed(RewardConfig) + undescribed(LoraConfig) == []


def test_flatten_dots_keys_and_numbers_lists_of_mappings() -> None:
    nested = {
        "a": {"b": 1, "c": {}},
        "rewards": [{"name": "x"}, {"name": "y"}],
        "betas": [0.9, 0.95],
        "e": [],
    }
    assert flatten(nested) == {
        "a.b": 1,
        "a.c": {},
        "rewards[0].name": "x",
        "rewards[1].name": "y",
        "betas": [0.9, 0.95],
        "e": [],
    }


def test_differing_keys_shows_old_and_new() -> None:
    before = {"a": 1, "b": {"c": None, "d": "x"}, "gone": True}
    after = {"a": 1, "b": {"c": 0.2, "d": "x"}, "new": [1]}
    assert differing_keys(before, after) == ["b.c: null -> 0.2", "gone: removed", "new: added"]
    assert differing_keys(before, before) == []
    assert differing_keys({"a": None}, {}) == ["a: removed"]  # null is a value
    assert differing_keys({"a": {"b": 1}}, {"a": None}) == ['a: {"b": 1} -> null']


def test_a_key_that_came_later_is_in_a_fingerprint_only_where_it_is_used() -> None:
    class Part(Section):
        size: int = 1
        stop: Annotated[list[str], ADDED] = Field([])

    class Whole(Section):
        name: str = "a"
        part: Part = Part()

    assert Whole().recorded() == {"name": "a", "part": {"size": 1}}
    assert Whole().recorded({"part"}) == {"name": "a"}
    assert Whole(part=Part(stop=["."])).recorded() == {"name": "a", "part": {"size": 1, "stop": ["."]}}
    assert Whole().model_dump()["part"] == {"size": 1, "stop": []}
