# transformers' models and configurations are not typed well enough for:
# mypy: disable-error-code="no-untyped-call"
"""Reward models in scorers of their own: the files of one process, whatever ends them or is wrong."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.conftest import Grpo
from tests.faults import crash
from tests.score.model_openers import (
    open_blind,
    open_hanging,
    open_misled,
    open_mute,
    open_noting,
    opened_by,
)
from tests.score.test_score_stage import reward, rows, scored, write_classifier
from tests.score.test_scorers_elsewhere import files_of, project_in, wait_for_none_of
from transformers import Qwen2ForSequenceClassification

from grpo.artifacts import ActiveRun
from grpo.errors import EngineError, ResourceError, UsageError
from grpo.execute import Pool, Worker
from grpo.execute.processes import Process
from grpo.score import scorers
from grpo.score.model_worker import ModelSettings, open_model_scorer

TWO = {"scorers": {"count": 2}}
BOTH: tuple[dict[str, Any], ...] = ({"model": "./rm", "weight": 0.5}, {"model": "./other", "weight": 2.0})


def with_models(folder: Path, *rewards: dict[str, Any], execution: Any = None, **score: Any) -> ActiveRun:
    """A project with two reward models: `rm` has a chat template, and fails on "five"; `other` has none."""
    folder.mkdir()
    for seed, name in enumerate(("rm", "other")):
        write_classifier(folder / name, seed)
    config = json.loads((folder / "rm" / "config.json").read_text())
    (folder / "rm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 27}))
    (folder / "other" / "chat_template.jinja").unlink()
    return project_in(folder, *rewards, execution=execution, **score)


def test_rewards_are_those_of_one_process(tmp_path: Path) -> None:
    """Batches, errors of rows and timings too; functions are called beside them."""
    three = (*BOTH, reward("length"))
    one, other = (
        with_models(tmp_path / name, *three, execution=execution, max_tokens_per_batch=60, on_error="drop")
        for name, execution in (("one", None), ("other", TWO))
    )
    for run in (one, other):
        scored(run)
    assert files_of(other) == files_of(one)
    assert [row["status"] for row in rows(one)] == [*["ok"] * 3, "error", *["ok"] * 14]
    assert len({row["value"] for row in rows(one) if row["name"] == "other"}) == 6

    def parts(run: ActiveRun) -> set[str]:
        [found] = run.folder("rewards", 0).glob("timings.json")
        return set(json.loads(found.read_text())["seconds"])

    assert parts(other) == parts(one) >= {"rm", "other", "length"}


def test_what_an_earlier_output_has_is_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(with_models(tmp_path / "p", BOTH[1], execution=TWO))
    opened_by(monkeypatch, open_mute)
    run = project_in(tmp_path / "p", {**BOTH[1], "weight": 3.0}, reward("length"), execution=TWO)
    scored(run, force=True)
    assert {row["name"]: row["weight"] for row in rows(run)} == {"other": 3.0, "length": 1.0}


def test_a_worker_that_is_killed_costs_its_shards_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it scores; its template's process ends with it. The others load each model once."""
    five = [{**each, "name": f"{each['model']}{number}"} for each in BOTH for number in range(2)]
    five.append(reward("length"))
    one = with_models(tmp_path / "one", *five, on_error="drop")
    scored(one)
    monkeypatch.setenv("SCORED_IN", str(tmp_path / "other"))
    opened_by(monkeypatch, open_noting, tmp_path / "loaded")
    killed, answer_of = list[int](), Pool._answer_of

    def kill_the_other(pool: Pool, now: Any, worker: Worker, what: str) -> Any:
        others = [each for each, given in pool._busy.items() if each is not worker and "rm" in given.name]
        for other in others if len(killed) < 2 and what == "score 0" else []:
            assert isinstance(other, Process)
            assert other.pid is not None
            os.kill(other.pid, signal.SIGKILL)
            killed.append(other.pid)
        return answer_of(pool, now, worker, what)

    monkeypatch.setattr(Pool, "_answer_of", kill_the_other)
    other = with_models(tmp_path / "other", *five, execution=TWO, on_error="drop")
    scored(other)
    assert killed
    assert files_of(other) == files_of(one)
    loaded = (tmp_path / "loaded").read_text().splitlines()
    assert len(set(loaded)) == len(loaded) <= 2 * (2 + len(killed))
    wait_for_none_of(tmp_path / "other")


# ---- what is wrong ----


def three_labels(folder: Path) -> None:
    Qwen2ForSequenceClassification(tiny.qwen2(num_labels=3)).save_pretrained(folder)


def damaged(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("wrong", [three_labels, damaged, without_tokenizer, without_weights])
def test_a_model_that_is_no_use_is_the_same_error(
    project: Path, grpo: Grpo, wrong: Callable[[Path], None]
) -> None:
    """Before anything is sampled."""
    write_classifier(project / "rm")
    wrong(project / "rm")

    def error_of(*more: str) -> tuple[int, str]:
        code, _, err = grpo("run", "--set", "score.rewards=[{model: ./rm}]", *more)
        return code, err.splitlines()[-1]

    alone = error_of()
    assert alone[0] in (4, 6)
    assert error_of("--set", "execution={scorers: {count: 2}}") == alone
    assert not [*project.rglob("rollouts/iteration=*")]


def test_a_batch_that_takes_too_long_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the line of one process (test_score_stage), once, and with all processes."""
    monkeypatch.setenv("SCORED_IN", str(tmp_path))
    opened_by(monkeypatch, open_hanging)
    late = {"model": "./other", "timeout_s": 0.5}
    run = with_models(tmp_path / "p", late, execution=TWO, max_tokens_per_batch=60)
    with pytest.raises(EngineError) as caught:
        scored(run)
    assert str(caught.value) == (
        f"reward model {tmp_path}/p/other: a batch of 4 rollouts took longer than timeout_s, 0.5 s;"
        " allow it more, or fewer score.max_tokens_per_batch"
    )
    wait_for_none_of(tmp_path)


def test_a_machine_without_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_models(tmp_path / "p", BOTH[0], execution=TWO)
    for open_worker, error, message in (
        (open_blind, ResourceError, r"does not see \S+/rm/\S+ as it was written; it has to be on a store"),
        (open_misled, UsageError, r"reward model \S+/rm: on \S+ it is not the one that the driver planned"),
    ):
        opened_by(monkeypatch, open_worker)
        with pytest.raises(error, match=message) as caught:
            scored(run)
        assert "\n" not in str(caught.value)


def test_gpus_are_for_ray_and_for_torch_that_finds_them(
    tmp_path: Path, project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(execution: str, *more: str) -> str:
        code, _, err = grpo("run", "--set", f"execution={execution}", *more)
        assert code == 2, err
        return err.splitlines()[-1]

    write_classifier(project / "rm")
    model = ("--set", "score.rewards=[{model: ./rm}]")
    assert "scorers.gpus: reward models on GPUs are for `backend: ray`" in refused("{scorers: {gpus: 1}}")
    with pytest.raises(UsageError, match=r"execution\.scorers\.gpus: torch finds none on \S+; a torch"):
        open_model_scorer(ModelSettings({}, "cuda", 1))
    monkeypatch.setattr(scorers, "gpu_is_there", lambda: True)
    for more in ((), ("--dry-run",)):
        assert "this machine computes on a GPU, and reward models would" in refused(
            "{scorers: {count: 2}}", *model, *more
        )
    scorers.check_place(project_in(tmp_path, reward("length"), execution=TWO).config)  # functions may


# ---- a run ----


@pytest.mark.slow
def test_a_run_and_its_evaluations(measured_project: Path, grpo: Grpo) -> None:
    write_classifier(measured_project / "rm")
    rewards = ("--set", "score.rewards=[{function: 'reward:code'}, {model: ./rm, weight: 0.1}]")

    def contents() -> dict[str, str]:
        return {name.partition("/")[2]: held for name, held in crash.contents(measured_project).items()}

    assert grpo("run", *rewards)[0] == 0
    one = contents()
    (measured_project / "artifacts").rename(measured_project.parent / "alone")
    code, _, err = grpo("run", *rewards, "--set", "execution={scorers: {count: 2}}")
    assert code == 0, err
    assert contents() == one
    assert grpo("run", *rewards)[2].endswith("nothing to do\n")  # where it was scored is in no fingerprint


def test_doctor_looks_at_them(project: Path, grpo: Grpo) -> None:
    write_classifier(project / "rm")
    both = "score.rewards=[{function: 'reward:code'}, {model: ./rm}]"
    code, out, err = grpo("doctor", "--json", "--set", both, "--set", "execution={scorers: {count: 3}}")
    assert code == 0, err
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["execution.scorers"]["found"] == "3 scorers, local"
    assert (
        found["execution.scorers, models"]["found"] == "3 scorers of reward models beside the others, local"
    )
    assert "scorers" in found["memory"]["needed"]
