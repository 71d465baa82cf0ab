"""update.surrogate of the user's: what it is given, what it may return, and every way it can fail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Grpo
from tests.pages.pages import DOCS, blocks
from tests.update.examples import (
    MASK,
    TRUNCATE,
    all_logprobs,
    as_old,
    configuration,
    deviation,
    gradients,
    in_double,
    make_learner,
    make_rollouts,
    permuted,
    settings,
    step_gradient,
    whole_step,
)
from tests.update.runs import commit_rollouts, make_run, update

from grpo.errors import EngineError, InputError, UsageError
from grpo.update import stage
from grpo.update.learner import Learner
from grpo.update.objective import Stored, objective_of
from grpo.update.own_surrogate import load, surrogate_of
from grpo.update.plan import plan

OURS = """\
import torch


def clip(logprobs, old_logprobs, advantages):
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def gspo(logprobs, old_logprobs, advantages, rollout):
    counts = torch.bincount(rollout)
    sums = torch.zeros(len(counts), dtype=logprobs.dtype).index_add(0, rollout, logprobs - old_logprobs)
    advantage = advantages[torch.searchsorted(rollout, torch.arange(len(counts)))]
    ratio = torch.exp(sums / counts)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage)


def rude(logprobs, old_logprobs, advantages, **rest):
    print("not on stdout")
    old_logprobs.zero_()
    advantages.mul_(0)
    rest["rollout"].zero_()
    assert bool(rest["mask"].all()) and len(rest["mask"]) == len(logprobs)
    return logprobs
"""


def written(folder: Path, text: str = OURS, name: str = "my_loss.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def gradient_of(checkpoint: Path, config: Any, rollouts: Any, folder: Path | None = None) -> Any:
    learner = make_learner(checkpoint, config, double=True)
    if folder is not None:
        learner.objective = objective_of(config, load(folder, config.surrogate))
    row, _ = learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())
    return row, gradients(learner.model)


@pytest.mark.parametrize("max_tokens", [1, 20, 16384])
@pytest.mark.parametrize(
    ("name", "objective", "changes"),
    [
        ("clip", "grpo", {}),
        ("clip", "dapo", {"clip_high": None, "aggregate": "prompt_mean", "entropy_coefficient": 0.1}),
        ("clip", "grpo", TRUNCATE | {"old_logprobs": "recomputed"}),
        ("gspo", "gspo", {"old_logprobs": "sampled"}),
        ("gspo", "gspo", {"old_logprobs": "sampled", "aggregate": "token_mean", "off_policy_mask": 0.01}),
    ],
)
def test_a_copy_of_ours_is_ours(
    tmp_path: Path, in_layer_norm: Path, name: str, objective: str, changes: dict[str, Any], max_tokens: int
) -> None:
    written(tmp_path)
    rollouts = make_rollouts()
    start = all_logprobs(in_double(in_layer_norm), rollouts)
    rollouts = replace(rollouts, old_logprobs=as_old(start, 0.2))
    keys = {"kl_coefficient": 0.0, "max_tokens_per_batch": max_tokens, **changes}
    usual = {key: value for key, value in keys.items() if key != "clip_high"}
    clips = {"clip_high": 0.2} if name == "clip" else {}
    row, expected = gradient_of(in_layer_norm, settings(objective, **usual, **clips), rollouts)
    own = settings(objective, **usual, surrogate=f"my_loss:{name}")
    found_row, found = gradient_of(in_layer_norm, own, rollouts, tmp_path)
    assert deviation(found, expected) <= 1e-12
    for column in ("loss", "policy_loss", "entropy", "ratio_mean", "ratio_max", "off_policy_fraction"):
        assert found_row[column] == pytest.approx(row[column], rel=1e-10)
    assert (found_row["clip_fraction_low"], found_row["clip_fraction_high"]) == (None, None)


def test_one_value_per_rollout_needs_no_other_ratio(tmp_path: Path, in_layer_norm: Path) -> None:
    # objective: grpo has token ratios: they are reported, and the surrogate goes its own way.
    written(tmp_path)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(in_layer_norm), rollouts), 0.2))
    own = settings("grpo", surrogate="my_loss:gspo", kl_coefficient=0.0)
    row, found = gradient_of(in_layer_norm, own, rollouts, tmp_path)
    gspo, expected = gradient_of(in_layer_norm, settings("gspo", old_logprobs="sampled"), rollouts)
    assert deviation(found, expected) <= 1e-12
    assert row["ratio_max"] > gspo["ratio_max"]


def test_what_it_changes_and_prints_reaches_nobody(
    tmp_path: Path, untied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.2))
    config = settings("grpo", surrogate="my_loss:rude", kl_coefficient=0.1, kl_importance=True)
    usual, _, _ = step_gradient(untied, settings("grpo", kl_coefficient=0.1, kl_importance=True), rollouts)
    learner = make_learner(untied, config)
    learner.objective = objective_of(config, load(tmp_path, "my_loss:rude"))
    learner.load_reference(untied)
    stored = Stored(reference=learner.reference_logprobs(rollouts, np.arange(len(rollouts))))
    row, _ = learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), stored)
    for column in ("kl", "ratio_mean", "ratio_max"):
        assert row[column] == usual[column]
    out, err = capsys.readouterr()
    assert out == ""
    assert "not on stdout" in err


def test_a_module_in_a_folder_with_a_dataclass_and_a_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "SCALE = 3.0\n", "neighbour_of_loss.py")
    text = """\
from __future__ import annotations
from dataclasses import dataclass
from neighbour_of_loss import SCALE

@dataclass
class Scaled:
    by: float

    def __call__(self, logprobs, advantages, weight=1.0):
        return self.by * weight * logprobs * advantages

surrogate = Scaled(SCALE)
"""
    written(tmp_path, text, "losses/mine.py")
    own = load(tmp_path, "losses.mine:surrogate")
    logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    value_N = own(logprobs_N, logprobs_N.detach(), torch.tensor([2.0, 0.5]), torch.tensor([0, 1]))
    assert value_N.tolist() == [-6.0, -3.0]
    assert list(tmp_path.rglob("*.pyc")) == [*tmp_path.glob("__pycache__/neighbour*.pyc")]


# ---- what is refused before anything is sampled ----

HEAD = "def surrogate(logprobs, old_logprobs, advantages, rollout):\n    "
REFUSED = {
    "a syntax error": ("def surrogate(:\n", "SyntaxError: invalid syntax (my_loss.py, line 1)"),
    "an import": ("import no_such_module_here\n", "ModuleNotFoundError: .*no_such_module_here.*line 1"),
    "an exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3 (my_loss.py, line 2)"),
    "no such name": (
        "def other(logprobs): return logprobs\n",
        "no function surrogate in my_loss.py; .* other",
    ),
    "no function": ("surrogate = 3\n", "no function surrogate in my_loss.py"),
    "a keyword of its own": (
        "def surrogate(logprobs, advs): return logprobs * advs\n",
        "needs advs; what it gets, by keyword: logprobs, old_logprobs, advantages, rollout, mask",
    ),
    "positional-only": (
        "def surrogate(logprobs, /): return logprobs\n",
        "needs logprobs; what it gets, by keyword",
    ),
    "a scalar": (
        HEAD + "return (logprobs * advantages).mean()\n",
        "returned shape \\(\\) for 2 rollouts of 5 tokens",
    ),
    "a column": (HEAD + "return (logprobs * advantages)[:, None]\n", "returned shape \\(5, 1\\)"),
    "a number": (HEAD + "return 1.0\n", "returned float, not a tensor"),
    "none": (HEAD + "logprobs * advantages\n", "returned NoneType, not a tensor"),
    "whole numbers": (HEAD + "return rollout\n", "returned torch.int64 on cpu, not a floating type on cpu"),
    "detached": (HEAD + "return logprobs.detach() * advantages\n", "no gradient by logprobs: is everything"),
    "another's gradient": (
        "import torch\nw = torch.ones(5, requires_grad=True)\n" + HEAD + "return w * advantages\n",
        "no gradient by logprobs",
    ),
    "not a number": (HEAD + "return logprobs * float('nan')\n", "returned nan or inf for made-up rollouts"),
    "an infinite slope": (HEAD + "return (logprobs * 0).sqrt()\n", "the gradient by logprobs is not finite"),
    "an exception": (
        HEAD + "x = 1\n    raise ValueError('two\\nlines')\n",
        "ValueError: two lines \\(my_loss.py, line 3",
    ),
    "one within torch": (
        HEAD + "return logprobs[:2] * advantages\n",
        "RuntimeError: The size of .*my_loss.py, line 2",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_function_that_cannot_be_maximised_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    text, message = REFUSED[fault]
    written(tmp_path, text)
    if "\\" not in message and ".*" not in message:
        message = message.replace("(", "\\(").replace(")", "\\)")
    with pytest.raises(UsageError, match=f"^update.surrogate: my_loss:surrogate: .*{message}") as caught:
        load(tmp_path, "my_loss:surrogate")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "changes", "way"),
    [
        ("gspo", {"top_entropy": 0.5}, "leave top_entropy out"),
        ("gspo", MASK | {"old_logprobs": "recomputed"}, "set sampler_correction_level: sequence_mean"),
    ],
)
def test_masks_and_weights_per_token_need_values_per_token(
    tmp_path: Path, untied: Path, name: str, changes: dict[str, Any], way: str
) -> None:
    written(tmp_path)
    run = make_run(tmp_path, configuration(surrogate=f"my_loss:{name}", **changes), untied, untied)
    with pytest.raises(UsageError, match=f"returns one value per rollout.*; {way}$"):
        surrogate_of(run)


# ---- what fails in a step ----

LATER = {
    "an exception": ("raise RuntimeError('not today')", r"RuntimeError: not today \(my_loss.py, line 3\)"),
    "another shape": (
        "return (logprobs * advantages)[:-1]",
        r"returned shape \(\d+,\), not \(\d+,\), which is one",
    ),
    "no gradient": ("return logprobs.detach()", "no gradient by logprobs"),
}


@pytest.mark.parametrize("fault", LATER)
def test_what_fails_later_is_one_line_and_no_step_is_taken(tmp_path: Path, untied: Path, fault: str) -> None:
    statement, message = LATER[fault]
    head = "def surrogate(logprobs, advantages):\n    if len(logprobs) != 5:\n"
    text = f"{head}        {statement}\n    return logprobs\n"
    written(tmp_path, text)
    config = settings(surrogate="my_loss:surrogate", kl_coefficient=0.0)
    learner = make_learner(untied, config)
    learner.objective = objective_of(config, load(tmp_path, config.surrogate))
    rollouts = make_rollouts()
    with pytest.raises(
        EngineError, match=f"^update.surrogate: my_loss:surrogate: .*{message}.*; nothing was comm"
    ):
        learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())
    assert not learner.optimizer.state


@pytest.mark.parametrize("per_rollout", [False, True])
def test_a_value_that_is_not_finite_names_its_rollouts(
    tmp_path: Path, untied: Path, per_rollout: bool
) -> None:
    # Only rollout 9, the one of advantage 0.25, meets the fault.
    value = "torch.where(advantages == 0.25, float('inf'), 1.0) * logprobs"
    if per_rollout:
        value = f"torch.zeros(int(rollout[-1]) + 1).index_add(0, rollout, {value})"
    written(tmp_path, f"import torch\n{HEAD}return {value}\n")
    config = settings(surrogate="my_loss:surrogate", kl_coefficient=0.0)
    learner = make_learner(untied, config)
    learner.objective = objective_of(config, load(tmp_path, config.surrogate))
    rollouts = make_rollouts()
    rollouts = replace(rollouts, advantages=np.where(np.arange(len(rollouts)) == 9, 0.25, 0.5))
    message = (
        r"^update.surrogate: my_loss:surrogate: returned nan or inf on rollouts \(iteration, group_id,"
        r" sample_id\) \(0, 2, 2\); nothing was committed$"
    )
    with pytest.raises(EngineError, match=message):
        learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())


# ---- the fingerprint ----


def test_its_source_is_a_part_of_the_fingerprint_and_what_is_loaded(tmp_path: Path, untied: Path) -> None:
    path = written(tmp_path)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.2))
    found: list[tuple[str, float]] = []
    for name in ("clip", "clip", "gspo"):
        config = configuration(surrogate=f"my_loss:{name}", kl_coefficient=0.0, learning_rate=0.01)
        run = make_run(tmp_path / f"{len(found)}", config, untied, untied)
        run.imports = tmp_path
        commit_rollouts(run, 0, permuted(rollouts, np.arange(len(rollouts))))
        learner = Learner(config.update, "cpu")
        stage.check(run, 1, None)
        found.append((plan(run, 0).fingerprint(0), update(run, 0, learner)[0]["grad_norm"]))
    assert found[0] == found[1]
    assert found[2] != found[0]
    path.write_text(OURS.replace("0.8, 1.2", "0.9, 1.1"))
    assert plan(run, 0).fingerprint(0) not in {fingerprint for fingerprint, _ in found}
    path.unlink()
    with pytest.raises(UsageError, match=r"^update.surrogate: .*my_loss.py: no such file$"):
        plan(run, 0)


def test_a_file_that_changes_as_the_update_begins(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    config = configuration(surrogate="my_loss:clip", kl_coefficient=0.0)
    run = make_run(tmp_path, config, untied, untied)
    commit_rollouts(run, 0, make_rollouts())
    monkeypatch.setattr(stage, "read_kept", lambda *_: path.write_text(OURS + "\n") and make_rollouts())
    with pytest.raises(InputError, match=r"^update.surrogate: .*my_loss.py changed as the update began"):
        update(run, 0, Learner(config.update, "cpu"))


def test_from_the_command_line(project: Path, grpo: Grpo) -> None:
    written(project)
    keys = ("--set", "update.surrogate=my_loss:clip", "--set", "update.off_policy_mask=0.5")
    code, _, err = grpo("run", *keys)
    assert code == 0, err
    code, out, _ = grpo("sql", "--json", "select off_policy_fraction, low_entropy_fraction from updates")
    assert code == 0
    assert '"off_policy_fraction"' in out
    code, _, err = grpo("doctor", *keys)
    assert code == 0, err
    written(project, "def clip(logprobs): return logprobs.detach()\n")
    code, out, err = grpo("status", *keys)
    assert "update.surrogate" in out + err
    code, out, err = grpo("doctor", *keys)
    assert code != 0
    assert "no gradient by logprobs" in out + err
    code, _, err = grpo("run", "--set", "run=other", *keys)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: update.surrogate: my_loss:clip: the value has no gradient")


# ---- the page ----

D = [0.0, 0.1, -0.2, 0.3, 0.4]  # of rollouts of 3 tokens and 2
LOGPROBS, ADVANTAGES = [-1.0, -2.0, -6.0, -0.5, -3.5], [1.0, 1.0, 1.0, -2.0, -2.0]
# KL-Cov: the rollouts' means are -3 and -2, so A (logprob - mean) is 2, 1, -3 | -3, 3: the last is over 2.
BY_HAND = {
    "gpg": [a * x for a, x in zip(ADVANTAGES, LOGPROBS, strict=True)],
    "dro": [a * x - 0.025 * d**2 for a, x, d in zip(ADVANTAGES, LOGPROBS, D, strict=True)],
    "kl_cov": [
        np.exp(d) * a - (0.4 if last else 0.0)
        for a, d, last in zip(ADVANTAGES, D, (0, 0, 0, 0, 1), strict=True)
    ],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_losses_on_the_page_are_what_it_says(tmp_path: Path, untied: Path, name: str) -> None:
    titles = {block.title: block.text for block in blocks((DOCS / "objectives.md").read_text())}
    text = titles[f"{name}.py"]
    assert len(text[text.index("def ") :].splitlines()) <= 10
    written(tmp_path, text, f"{name}.py")
    own = load(tmp_path, f"{name}:{name}")
    logprobs_N = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    constants = (torch.tensor(values, dtype=torch.float64) for values in (D, ADVANTAGES))
    d_N, advantages_N = constants
    value_N = own(logprobs_N, logprobs_N.detach() - d_N, advantages_N, torch.tensor([0, 0, 0, 1, 1]))
    assert value_N.tolist() == pytest.approx(BY_HAND[name], rel=1e-12)

    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.2))
    found = []
    for max_tokens in (1, 16384):  # nothing on the page depends on the micro-batch
        config = settings(surrogate=f"{name}:{name}", kl_coefficient=0.0, max_tokens_per_batch=max_tokens)
        found.append(gradient_of(untied, config, rollouts, tmp_path))
    (one, gradient), (whole, expected) = found
    assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert deviation(gradient, expected) <= 1e-6


def test_rollouts_of_advantage_0_are_read_too(tmp_path: Path, untied: Path) -> None:
    """A function may have terms without the advantage, as dro.py of the page has."""
    written(
        tmp_path,
        "def far(logprobs, old_logprobs, advantages):\n"
        "    return advantages * logprobs - (logprobs - old_logprobs) ** 2\n",
    )
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.2))
    advantages = rollouts.advantages.copy()
    advantages[::2] = 0.0
    config = settings(surrogate="my_loss:far", kl_coefficient=0.0, aggregate="sequence_mean")
    found = [
        gradient_of(untied, config, replace(rollouts, advantages=each), tmp_path)
        for each in (advantages, np.where(advantages == 0, 1e-12, advantages))
    ]
    assert found[0][0]["loss"] == pytest.approx(found[1][0]["loss"], rel=1e-6)
    assert deviation(found[0][1], found[1][1]) <= 1e-6


def test_gpg_is_what_all_come_down_to_on_policy(tmp_path: Path, untied: Path) -> None:
    written(tmp_path, "def gpg(logprobs, advantages):\n    return advantages * logprobs\n")
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    own = settings(surrogate="my_loss:gpg", kl_coefficient=0.0, aggregate="token_mean")
    _, expected = gradient_of(untied, own, rollouts, tmp_path)
    for name in ("grpo", "cispo", "sapo", "dppo", "vespo", "scalerl"):
        config = settings(name, kl_coefficient=0.0, aggregate="token_mean")
        assert deviation(gradient_of(untied, config, rollouts)[1], expected) <= 1e-5, name
