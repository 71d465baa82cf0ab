"""Teachers: what they say of each sampled token, what is kept and refused, and runs that learn of one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.conftest import Grpo, run_within
from transformers import AutoModelForCausalLM

from grpo import sql, tables
from grpo.artifacts import ActiveRun
from grpo.config import load
from grpo.console import Console

KEYS = ["iteration", "group_id", "sample_id"]


@pytest.fixture
def taught(project: Path) -> Path:
    return taught_in(project)


def taught_in(project: Path) -> Path:
    """A project whose folder `teacher` is its model with other weights, and no reward but the teacher's."""
    make_teacher(project, "teacher", seed=1)
    text = (project / "pipeline.yaml").read_text()
    kept = text[: text.index("score:")]
    (project / "pipeline.yaml").write_text(
        f"{kept}score: {{teachers: [{{model: teacher}}], max_tokens_per_batch: 24}}\n"
        "update: {learning_rate: 0.01, kl_coefficient: 0.0}\n"
    )
    return project


def make_teacher(project: Path, name: str, seed: int) -> Path:
    folder = project / name
    shutil.copytree(project / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def opened(project: Path) -> ActiveRun:
    config = load(project / "pipeline.yaml")
    return ActiveRun(project / "artifacts", config, project, Console(quiet=True))


def rows_of(project: Path, table: str, iteration: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = opened(project).read(table, iteration).to_pylist()
    return found


def run(grpo: Grpo, *arguments: str) -> str:
    code, _, err = grpo(*arguments)
    assert code == 0, err
    return err


def test_the_log_probs_are_those_of_plain_transformers(taught: Path, grpo: Grpo) -> None:
    run(grpo, "run", "--until", "1", "--set", "generate.temperature=0.7")
    model = AutoModelForCausalLM.from_pretrained(taught / "teacher", attn_implementation="eager")
    rollouts, found = rows_of(taught, "rollouts"), rows_of(taught, "teacher_logprobs")
    assert [row["name"] for row in found] == ["teacher"] * len(rollouts)
    assert [[row[key] for key in KEYS] for row in found] == [[row[key] for key in KEYS] for row in rollouts]
    for row, said in zip(rollouts, found, strict=True):
        ids = row["prompt_token_ids"] + row["response_token_ids"]
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0] / 0.7
        expected = logits_TV.log_softmax(-1)[np.arange(len(ids) - 1), ids[1:]].numpy()
        expected = expected[len(row["prompt_token_ids"]) - 1 :]
        np.testing.assert_allclose(said["logprobs"], expected, atol=2e-5)
        assert said["gap"] == pytest.approx(np.mean(expected - np.array(row["old_logprobs"])), abs=2e-5)


def test_a_run_without_a_reward(taught: Path, grpo: Grpo) -> None:
    run(grpo, "run", "--set", "generate.samples_per_prompt=1")
    code, out, _ = grpo("sql", "--json", "select * from iterations order by iteration")
    first, second = json.loads(out)
    assert code == 0
    assert first["rollouts_kept"] == first["rollouts"] == 3
    assert [first[name] for name in ("reward", "pass_rate", "groups_without_signal")] == [None] * 3
    assert first["grad_norm"] > 0
    gaps = [row["gap"] for row in rows_of(taught, "teacher_logprobs")]
    assert first["teacher_gap"] == pytest.approx(np.mean(gaps))
    code, out, _ = grpo(
        "sql", "--json", "select teacher_gap, advantage, reward from samples where iteration = 0"
    )
    assert [row["teacher_gap"] for row in json.loads(out)] == pytest.approx(gaps)
    assert {row["advantage"] for row in json.loads(out)} == {0.0}
    assert {row["reward"] for row in json.loads(out)} == {None}
    assert second["teacher_gap"] is not None
    for command in (("verify",), ("status",), ("doctor",), ("show",), ("report",), ("gc", "--dry-run")):
        code, _, err = grpo(*command)
        assert code in (0, 2), (command, err)
        assert "Traceback" not in err
    run(grpo, "fork", "tiny", "other", "--iteration", "1")
    run(grpo, "run", "--set", "run=other", "--set", "generate.samples_per_prompt=1")


def test_drop_zero_variance_drops_nothing_where_there_is_no_reward(taught: Path, grpo: Grpo) -> None:
    run(grpo, "run", "--until", "1", "--set", "update.objective=dapo")
    assert all(row["keep"] for row in rows_of(taught, "advantages"))


def test_beside_a_reward(taught: Path, grpo: Grpo) -> None:
    reward = '[{"function": "reward:code"}]'
    run(grpo, "run", "--until", "1", "--set", f"score.rewards={reward}")
    advantages = rows_of(taught, "advantages")
    assert any(row["advantage"] for row in advantages)
    assert len(rows_of(taught, "rewards")) == len(rows_of(taught, "teacher_logprobs")) == len(advantages)


def changed(project: Path, before: dict[str, Any], output: str) -> bool:
    manifest = opened(project).manifest(output, 0)
    assert manifest is not None
    return bool(
        manifest.fingerprint != before[output].fingerprint or manifest.attempt != before[output].attempt
    )


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("score.teachers[0].weight=0.5", {"update"}),
        ("score.teachers[0].model=other", {"rewards", "update"}),
        ("score.teachers=[{model: teacher}, {model: other, weight: 0.1}]", {"rewards", "update"}),
    ],
)
def test_what_a_change_makes_anew(taught: Path, grpo: Grpo, override: str, again: set[str]) -> None:
    make_teacher(taught, "other", seed=2)
    run(grpo, "run", "--until", "1")
    before = {output: opened(taught).manifest(output, 0) for output in ("rewards", "advantages", "update")}
    for stage in ("score", "advantage", "update"):
        code, _, err = grpo(stage, "--iteration", "0", "--set", override)
        assert code in (0, 4), (stage, err)
        assert code == 0 or {"score": "rewards", "update": "update"}.get(stage) in again, err
        if code:
            run(grpo, stage, "--iteration", "0", "--force", "--set", override)
    assert {output for output in before if changed(taught, before, output)} == again


def test_a_teacher_that_is_known_is_kept_beside_a_new_one(taught: Path, grpo: Grpo) -> None:
    make_teacher(taught, "other", seed=2)
    run(grpo, "run", "--until", "1")
    held = opened(taught).manifest("rewards", 0)
    both = "score.teachers=[{model: other}, {model: teacher}]"
    run(grpo, "score", "--iteration", "0", "--force", "--set", both)
    after = opened(taught).manifest("rewards", 0)
    assert held is not None
    assert after is not None
    shas = {file.sha256 for file in after.files if file.labels.get("teacher") == "teacher"}
    assert shas == {file.sha256 for file in held.files if file.labels.get("teacher") == "teacher"}
    assert sorted(after.ids) == ["teacher/other", "teacher/teacher"]


def exchange_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    path.write_text(json.dumps(data))


def shorten(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 4}))


def ruin(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e3)
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("break_it", "code", "message"),
    [
        (
            exchange_tokens,
            3,
            "has token 49, '1' for the policy and '2' for the teacher; a teacher needs the pol",
        ),
        (shorten, 3, "tokens, and its context 4; take another teacher"),
        (ruin, 8, "a log-prob of rollout (iteration, group_id, sample_id) (0, 0, 0) is not finite"),
        (shutil.rmtree, 4, "no such directory"),
    ],
)
def test_a_teacher_that_is_no_use(
    taught: Path, grpo: Grpo, break_it: Callable[[Path], Any], code: int, message: str
) -> None:
    break_it(taught / "teacher")
    found, _, err = grpo("run", "--until", "1")
    assert (found, message in err.splitlines()[-1]) == (code, True), err
    assert not opened(taught).manifest("rewards", 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["update.objective=gspo"], "score.teachers: teachers give each token an advantage of its own"),
        (["update.off_policy_mask=0.1"], "update.off_policy_mask: is for rollouts of A < 0"),
        (["score.teachers=[]"], "score.rewards: is required and missing"),
        (["score={rewards: []}"], "score.rewards: expected at least 1 item"),
        (["score.teachers=[{model: a/t}, {model: b/t}]"], "two teachers are named t"),
        (["generate.dynamic_sampling={min_groups: 1, max_rounds: 2}"], "looks for rewards that differ"),
        (["evaluate={prompts: {source: prompts.jsonl}}"], "evaluate: measures by a reward; give one"),
        (
            ["generate.samples_per_prompt=1", 'score.rewards=[{function: "reward:code"}]'],
            "generate.samples_per_prompt: expected at least 2",
        ),
    ],
)
def test_what_does_not_go_with_teachers(taught: Path, grpo: Grpo, overrides: list[str], message: str) -> None:
    code, _, err = grpo("run", *(part for each in overrides for part in ("--set", each)))
    assert code == 2
    assert message in err


ROWS = "teacher_logprobs: not each rollout once"
VALUES = "teacher_logprobs: not one per token, not finite, or above 0"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows, {}),
        (lambda rows: rows[1:], {ROWS: 1}),
        (lambda rows: [*rows, rows[0]], {ROWS: 1}),
        (lambda rows: [*rows, {**rows[0], "sample_id": 99}], {ROWS: 1}),
        (lambda rows: [{**rows[0], "logprobs": rows[0]["logprobs"][:-1]}, *rows[1:]], {VALUES: 1}),
        (lambda rows: [{**rows[0], "logprobs": [float("nan")] * 4}, *rows[1:]], {VALUES: 1}),
        (lambda rows: [{**row, "logprobs": [0.5] * len(row["logprobs"])} for row in rows], {VALUES: 6}),
    ],
)
def test_verify_asks_what_must_hold(
    learned: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], expected: dict[str, int]
) -> None:
    rows = change(rows_of(learned, "teacher_logprobs"))
    with sql.connect([opened(learned)]) as connection:
        data = pa.Table.from_pylist(rows, schema=tables.schema("teacher_logprobs"))
        sql.register(connection, "_teacher_logprobs_0", data)
        found = sql.rows(connection, "sql/views/teacher_invariants")
    assert {row["invariant"]: row["rows"] for row in found} == expected


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, write_project: Callable[[Path], Path]) -> Path:
    project = taught_in(write_project(tmp_path_factory.mktemp("learned") / "project"))
    run_within(project, "run", "--until", "1")
    return project


def test_verify_of_a_run_that_is_right(learned: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(learned)
    code, out, _ = grpo("verify")
    assert code == 0
    assert "0 damaged, 0 broken, 0 stale" in out


def test_without_teachers_there_is_no_such_table(project: Path, grpo: Grpo) -> None:
    run(grpo, "run", "--until", "1")
    manifest = opened(project).manifest("rewards", 0)
    assert manifest is not None
    assert {file.table for file in manifest.files} == {"rewards"}
    assert "teachers" not in manifest.config["score"]
    code, out, _ = grpo("sql", "--json", "select teacher_gap from iterations")
    assert (code, json.loads(out)) == (0, [{"teacher_gap": None}])
