# transformers' models and configurations are not typed well enough for:
# mypy: disable-error-code="no-untyped-call,call-arg"
"""examples/gsm8k.yaml through the command line, with the starter model in the place of the real one."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tests import tiny
from tests.conftest import Grpo
from transformers import Qwen2ForSequenceClassification

from grpo.artifacts import ARTIFACTS, POLICY, ActiveRun, Run, held_part
from grpo.config import load
from grpo.console import Console
from grpo.models import starter_model as starter
from grpo.models.loading import load_model, load_tokenizer
from grpo.score.functions.built_in import BUILT_IN, gsm8k, regex_format

EXAMPLE = Path(__file__).parents[2] / "examples" / "gsm8k.yaml"
DATA = Path(__file__).parents[1] / "data" / "gsm8k" / "train.jsonl"
K = 8


def problems() -> list[dict[str, str]]:
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def settings(starter_model: Path) -> list[str]:
    """The example, small: what is set is what a machine without a GPU cannot do in seconds."""
    keys = {
        "model": starter_model,
        "prompts.source": DATA,
        "generate.prompts_per_iteration": 3,
        "generate.max_new_tokens": 12,
        "score.workers": 1,
    }
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def done(starter_model: Path, grpo: Grpo, tmp_path_factory: pytest.TempPathFactory) -> tuple[ActiveRun, str]:
    """Two iterations of the example, and what was said; read them only."""
    folder = tmp_path_factory.mktemp("gsm8k")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, out, err = grpo("run", "-c", str(EXAMPLE), "--until", "2", *settings(starter_model))
    assert (code, out) == (0, ""), err
    config = load(EXAMPLE, settings(starter_model)[1::2])
    return ActiveRun(folder / ARTIFACTS, config, EXAMPLE.parent, Console(quiet=True)), err


# ---- the file ----


def test_the_example_is_as_its_comments_say() -> None:
    config = load(EXAMPLE)
    assert (config.run, config.model) == ("gsm8k", "Qwen/Qwen2.5-0.5B-Instruct")
    assert (config.prompts.source, config.prompts.chat) == ("gsm8k.jsonl", True)
    assert config.generate.prompts_per_iteration * config.generate.samples_per_prompt == 512
    assert [(reward.function, reward.weight) for reward in config.score.rewards] == [
        ("gsm8k", 1.0),
        ("regex_format", 0.1),
    ]
    columns = config.prompts.columns
    assert set(problems()[0]) == {columns.prompt, columns.answer}
    # Every command in the comments is one of ours, on this file.
    commands = re.findall(r"^#   (grpo .*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(commands) == 5
    assert all("-c examples/gsm8k.yaml" in command for command in commands)


@pytest.mark.parametrize(
    ("response", "layout"),
    [
        ("3 + 4 = 7\n#### 7", 1.0),
        ("a\nb\n#### -1,234.50\n", 1.0),
        ("#### 7", 0.0),  # no step before it
        ("3 + 4 = 7 #### 7", 0.0),  # not on a line of its own
        ("3 + 4 = 7\n#### 7 apples", 0.0),
        ("3 + 4 = 7\n#### 7\nor 8", 0.0),
        ("3 + 4 = 7", 0.0),
        ("3 + 4\n#### seven", 0.0),
    ],
)
def test_the_pattern_is_the_layout_that_the_system_prompt_asks_for(response: str, layout: float) -> None:
    arguments = load(EXAMPLE).score.rewards[1].arguments
    assert regex_format(["p"], [response], **arguments) == [layout]


def test_a_reference_solution_earns_both_rewards() -> None:
    answers = [problem["answer"] for problem in problems()]
    arguments = load(EXAMPLE).score.rewards[1].arguments
    assert gsm8k(answers, answers, answers) == [1.0] * 64
    assert regex_format(answers, answers, **arguments) == [1.0] * 64


# ---- the run ----


def test_two_iterations_are_complete(done: tuple[Run, str]) -> None:
    run, said = done
    for iteration in (0, 1):
        for output in ("rollouts", "rewards", "advantages", "update"):
            assert run.manifest(output, iteration) is not None
    assert run.iterations() == [0, 1]
    assert "error" not in said
    assert run.read("prompts", None).num_rows == 64


def test_rollouts_hold_the_real_questions_through_the_chat_template(done: tuple[ActiveRun, str]) -> None:
    run, _ = done
    questions = [problem["question"] for problem in problems()]
    system = run.config.prompts.system
    assert system is not None
    assert system.endswith("such as: #### 42")
    seen = set()
    for iteration in (0, 1):
        rollouts = run.read("rollouts", iteration).to_pylist()
        assert len(rollouts) == 3 * K
        for row in rollouts:
            question = questions[row["prompt_id"]]
            assert row["prompt"] == f"system: {system}\nuser: {question}\nassistant: "
            assert bytes(row["prompt_token_ids"]).decode() == row["prompt"]  # a token is a byte
            assert 1 <= row["response_tokens"] <= 12
            assert row["policy_iteration"] == iteration
        seen |= {row["prompt_id"] for row in rollouts}
    assert len(seen) == 6  # one pass over 64 problems draws none twice


def test_rewards_are_what_the_functions_give_the_stored_responses(done: tuple[ActiveRun, str]) -> None:
    run, _ = done
    answers = [problem["answer"] for problem in problems()]
    for iteration in (0, 1):
        rollouts = run.read("rollouts", iteration).to_pylist()
        rewards = run.read("rewards", iteration).to_pylist()
        assert [row["name"] for row in rewards] == ["gsm8k"] * 24 + ["regex_format"] * 24
        assert {row["status"] for row in rewards} == {"ok"}
        assert {row["value"] for row in rewards} <= {0.0, 1.0}
        responses = [row["response"] for row in rollouts]
        right = [answers[row["prompt_id"]] for row in rollouts]
        arguments = run.config.score.rewards[1].arguments
        correct = gsm8k(responses, responses, right)
        layout = regex_format(responses, responses, **arguments)
        assert [row["value"] for row in rewards] == correct + layout
        # The reward of a rollout is 1 x gsm8k + 0.1 x regex_format.
        total = [(a or 0.0) + 0.1 * (b or 0.0) for a, b in zip(correct, layout, strict=True)]
        assert run.read("advantages", iteration)["reward"].to_pylist() == pytest.approx(total)


def test_policy_two_is_there_and_loads(done: tuple[ActiveRun, str], starter_model: Path) -> None:
    run, _ = done
    folder = held_part(run, 2, POLICY)
    assert folder is not None
    trained, before = load_model(folder, "cpu"), load_model(starter_model, "cpu")
    assert load_tokenizer(folder).chat_template == starter.CHAT_TEMPLATE
    pairs = list(zip(trained.state_dict().values(), before.state_dict().values(), strict=True))
    # Two steps of AdamW move a weight by at most about 2 x 1e-6, whatever the gradient.
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 3e-6
    updates = run.read("updates", 1)
    assert updates.num_rows == 1
    assert updates["learning_rate"].to_pylist() == [1e-6]


def test_the_queries_of_the_comments_run(
    done: tuple[Run, str], starter_model: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = done
    monkeypatch.chdir(run.root.parent)
    [query] = re.findall(r'^#   grpo sql .* "(.*)"$', EXAMPLE.read_text(), re.MULTILINE)
    code, out, err = grpo("sql", "-c", str(EXAMPLE), query, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["iteration"], row["name"]) for row in rows] == [
        (iteration, name) for iteration in (0, 1) for name in ("gsm8k", "regex_format")
    ]
    code, out, err = grpo("show", "-c", str(EXAMPLE))
    assert code == 0, err
    code, out, err = grpo("status", "-c", str(EXAMPLE), *settings(starter_model), "--json")
    assert code == 0, err


def test_a_response_that_is_right_is_rewarded(starter_model: Path, tmp_path: Path) -> None:
    # The other half of the circle: the functions the example names are the built-in ones.
    assert BUILT_IN[str(load(EXAMPLE).score.rewards[0].function)] is gsm8k
    problem = problems()[0]
    prompt: Any = [{"role": "user", "content": problem["question"]}]
    completion: Any = [{"role": "assistant", "content": problem["answer"]}]
    assert gsm8k([prompt], [completion], [problem["answer"]]) == [1.0]


# ---- a reward model instead of functions ----

REWARD_MODEL_YAML = """\
run: liked
iterations: 2
model: MODEL
prompts: {source: arithmetic}
generate: {prompts_per_iteration: 4, samples_per_prompt: 4, max_new_tokens: 4}
score:
  rewards:
    - {model: ./rm, weight: 0.5}
update: {learning_rate: 1.0e-3}
"""


def test_two_iterations_with_a_reward_model(
    starter_model: Path, grpo: Grpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    classifier = Qwen2ForSequenceClassification(tiny.qwen2(num_labels=1)).eval()
    classifier.save_pretrained(tmp_path / "rm")
    starter.build_tokenizer().save_pretrained(tmp_path / "rm")
    (tmp_path / "pipeline.yaml").write_text(REWARD_MODEL_YAML.replace("MODEL", str(starter_model)))
    monkeypatch.chdir(tmp_path)

    code, out, err = grpo("run", "--json")
    assert code == 0, err
    assert json.loads(out)["worked"] == 2

    run = ActiveRun(ARTIFACTS, load(Path("pipeline.yaml")), tmp_path, Console(quiet=True))
    for iteration in (0, 1):
        rollouts = run.read("rollouts", iteration).to_pylist()
        expected = [value_of(classifier, row["prompt"], row["response"]) for row in rollouts]
        rewards = run.read("rewards", iteration)
        assert set(rewards["name"].to_pylist()) == {"rm"}
        assert rewards["value"].to_pylist() == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 0.01  # there is something to learn from
        advantages = run.read("advantages", iteration)
        assert mean(advantages["reward"]) == pytest.approx(0.5 * sum(expected) / 16, abs=1e-5)
        assert run.read("updates", iteration)["skipped"].to_pylist() == [False]
    # At a learning rate of 1e-3, AdamW's first step moves each weight that has a gradient by about 1e-3.
    folder = held_part(run, 2, POLICY)
    assert folder is not None
    trained, before = load_model(folder, "cpu"), load_model(starter_model, "cpu")
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert min(moved) > 2e-4
    code, out, err = grpo("sql", "select avg(value) as v from rewards where iteration = 1", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["v"] == pytest.approx(sum(expected) / 16, abs=1e-5)


def value_of(classifier: Any, prompt: str, response: str) -> float:
    """By a plain forward pass over the finished conversation; 256 is the end-of-sequence token."""
    token_ids = [*f"user: {prompt}\nassistant: {response}".encode(), 256, *b"\n"]
    with torch.inference_mode():
        return float(classifier(input_ids=torch.tensor([token_ids])).logits[0, 0])


def mean(column: pa.ChunkedArray) -> float:
    numbers = column.to_pylist()
    return float(sum(numbers)) / len(numbers)
