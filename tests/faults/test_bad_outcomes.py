"""The bad input of RELIABILITY.md that shows while work goes on: rewards, checkpoints, numbers, the disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Grpo
from tests.faults.refusals import RUN, RUN_ON, STARTED, Case, check, configure, folder, nothing, write

SAMPLED = (*STARTED, "rollouts")
REWARD = '{function: "reward:code"}'


def returns(name: str, expression: str, message: str, status: str = "error") -> Case:
    """A reward function of one expression over a group of two; all six rollouts of the iteration fail."""
    source = f"import torch\ndef code(completions, **columns):\n    return {expression}\n"
    text = f"score: iteration 0: 6 of 6 rewards failed (6 {status}); first: code: {message}"
    return Case(name, write("reward.py", source), RUN, 8, text, (*SAMPLED, "rewards"))


REWARDS = [
    # NaN, infinite, a string, too few, too many, beside others that are right: test_reward_functions.py
    returns("no reward at all", "None", "returned NoneType, not a list of 2 numbers"),
    returns("rewards in a tensor of two dimensions", "torch.zeros(2, 2)", "returned Tensor of shape (2, 2)"),
    returns("NaN in a tensor", "torch.full((len(completions),), torch.nan)", "returned nan", "nonfinite"),
    # and worse
    returns(
        "a reward beyond float64", "[10**400] * 2", "returned a number too large for a float", "nonfinite"
    ),
    returns("rewards in a dict", "{}", "returned dict '{}', not a list of 2 numbers"),
    returns("a function that exits", "exit(0)", "SystemExit: 0"),
    Case(
        "rewards whose deviation is beyond float64",
        write("reward.py", "def code(completions, **columns):\n    return [1e308, -1e308]\n"),
        RUN,
        3,
        "advantage: group_std of rollout (iteration, group_id, sample_id) (0, 0, 0) is not finite; scale the",
        (*SAMPLED, "rewards"),
    ),
]


@pytest.mark.parametrize("case", REWARDS, ids=lambda case: case.input)
def test_a_reward_that_is_no_number(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)
    statuses = json.loads(grpo("sql", "select distinct status from rewards", "--json")[1])
    assert len(statuses) == 1  # committed with the rows


def test_a_reward_that_is_none_does_not_apply(project: Path, grpo: Grpo) -> None:
    write("reward.py", "def code(completions, **columns):\n    return [None] * len(completions)\n")()
    assert grpo("run", "--until", "1")[0] == 3  # no rollout is kept
    [row] = json.loads(grpo("sql", "select distinct status, value from rewards", "--json")[1])
    assert row == {"status": "not_applicable", "value": None}


FUNCTIONS = [
    # found before anything is sampled; what else is wrong with functions: tests/score/functions
    Case(
        "a syntax error",
        write("reward.py", "def code(:\n"),
        RUN,
        2,
        "reward function 'reward:code': importing reward failed: SyntaxError: invalid syntax (reward.py, ",
    ),
    Case(
        "no such built-in",
        configure((REWARD, '{function: "exact_anser"}')),
        RUN,
        2,
        "reward function 'exact_anser': no such built-in; did you mean exact_answer?",
    ),
    Case("reward.py: a folder", folder("reward.py"), RUN, 2, "no module file reward.py in"),
    Case("no reward model", configure((REWARD, "{model: nope}")), RUN, 4, "nope: no such directory", STARTED),
    Case(
        "a reward model of two labels",
        configure((REWARD, "{model: ./model}")),
        RUN,
        4,
        "has 2 labels",
        STARTED,
    ),
]


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.input)
def test_a_reward_that_cannot_be_asked(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], object]:
    """Change the tensors of the starting checkpoint."""

    def spoil() -> None:
        tensors = load_file("model/model.safetensors")
        change(tensors)
        save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})

    return spoil


def config(**changes: Any) -> Callable[[], object]:
    """Change keys of the starting checkpoint's config.json."""
    path = Path("model/config.json")
    return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damaged(name: str, spoil: Callable[[], object], message: str) -> Case:
    """Weights are read for the policy's weight check, which is of the prompts: these stay."""
    return Case(name, spoil, RUN, 6, message, ("prompts",))


NORM = "model.norm.weight"
CHECKPOINTS = [
    # missing file, wrong shapes, NaN weights: 4 or 6
    Case("no checkpoint", lambda: shutil.rmtree("model"), RUN, 4, "model: no such directory; a Hugging Face"),
    Case(
        "no weights", Path("model/model.safetensors").unlink, RUN, 4, "model: holds no .safetensors weights"
    ),
    Case("no config.json", Path("model/config.json").unlink, RUN, 4, "model: has no config.json"),
    Case("no tokenizer", Path("model/tokenizer.json").unlink, RUN, 4, "tokenizer"),
    damaged(
        "wrong shapes", config(hidden_size=32), "embed_tokens.weight has shape [258, 16]; config.json asks"
    ),
    damaged(
        "one wrong shape", weights(lambda held: held.update({NORM: torch.ones(3)})), f"weight {NORM} has"
    ),
    damaged(
        "a missing weight", weights(lambda held: held.pop(NORM)), f"missing weight {NORM}; the weights must"
    ),
    damaged("NaN weights", weights(lambda held: held[NORM].fill_(torch.nan)), f"weight {NORM} holds NaN or"),
    # and worse
    damaged(
        "weights of any bytes", write("model/model.safetensors", b"x" * 99), "its weights cannot be read"
    ),
    damaged("empty weights", write("model/model.safetensors", ""), "its weights cannot be read"),
    Case("config.json: cut off", write("model/config.json", "{"), RUN, 6, "model/config.json: is not JSON"),
    Case("an unknown architecture", config(model_type="nope"), RUN, 4, "model type `nope`"),
    Case(
        "a tokenizer that is none",
        write("model/tokenizer.json", "{}"),
        RUN,
        4,
        "its tokenizer cannot be loaded",
    ),
    Case(
        "the reference is not there",
        configure(("update: {", "update: {reference: nope, ")),
        RUN,
        4,
        "nope: no such",
    ),
]


@pytest.mark.parametrize("case", CHECKPOINTS, ids=lambda case: case.input)
def test_a_checkpoint_that_cannot_be_used(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


POLICY = "artifacts/tiny/iteration=000001/checkpoint/policy"
LATER = [
    # another tokenizer than the rollouts were sampled with; and what an update wrote
    Case(
        "another tokenizer",
        write("model/tokenizer.json", "{}"),
        RUN_ON,
        4,
        "model: fixed for the run tiny, but",
    ),
    Case("another model", config(rms_norm_eps=1e-3), RUN_ON, 4, "model: fixed for the run tiny, but changed"),
    Case(
        "a policy's tokenizer changed",
        write(f"{POLICY}/tokenizer.json", "{}"),
        RUN_ON,
        6,
        "tokenizer.json: 2 bytes",
    ),
    Case(
        "a policy's weights are gone",
        Path(f"{POLICY}/model.safetensors").unlink,
        RUN_ON,
        6,
        "missing, though its",
    ),
    Case(
        "a policy is gone", lambda: shutil.rmtree(POLICY), RUN_ON, 6, "missing, though its manifest lists it"
    ),
]


@pytest.mark.parametrize("case", LATER, ids=lambda case: case.input)
def test_a_checkpoint_that_changed_since(finished: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def rewards_of(size: str) -> Callable[[], object]:
    """Rewards of this size, which advantages keep."""

    def spoil() -> None:
        write("reward.py", f"def code(completions, **columns):\n    return [{size}, -{size}]\n")()
        configure(("update:", "advantage: {scale: none}\nupdate:"))()

    return spoil


SCORED = (*SAMPLED, "rewards", "advantages")
EVERY = "rollouts (iteration, group_id, sample_id) (0, "
NUMBERS = [
    # loss or gradient NaN in update: 8, nothing committed, the offending rollouts' keys named
    Case("a loss that is NaN", rewards_of("3e38"), RUN, 8, f"update: the loss is nan on {EVERY}", SCORED),
    Case(
        "a gradient that is infinite",
        rewards_of("1e37"),
        RUN,
        8,
        f"update: the gradient is inf on {EVERY}",
        SCORED,
    ),
    Case(
        "a step that ruins the policy",
        configure(("0.01", "1.0e+308")),
        RUN,
        8,
        "update: the log-probs of the new policy are not finite; lower",
        SCORED,
    ),
]


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case.input)
def test_a_number_that_is_none_in_update(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def test_a_gradient_that_is_nan(project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    check(
        grpo,
        Case("a gradient that is NaN", nothing, RUN, 8, f"update: the gradient is nan on {EVERY}", SCORED),
    )


@pytest.mark.parametrize("stage", ["generate", "score", "advantage", "update"])
def test_no_space_for_what_a_stage_is_about_to_write(
    finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Found before the stage's tool is opened: no engine, no worker, no model."""
    monkeypatch.setattr("grpo.artifacts.space.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("grpo.pipeline.resources.Resources.get", lambda *_: pytest.fail("work was begun"))
    output = {"generate": "rollouts", "score": "rewards", "advantage": "advantages"}.get(stage, stage)
    message = (
        f"iteration=000001/{output}: needs about 1 MiB, 0 MiB are free on its disk; free some (`grpo gc`)"
    )
    command = (stage, "--iteration", "1", "--force")
    check(grpo, Case(f"no space for {stage}", nothing, command, 7, message))
