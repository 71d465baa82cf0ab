"""Trackers: the real packages, offline, read back from what they wrote."""

import importlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo

from grpo.artifacts import ARTIFACTS, ActiveRun, seal
from grpo.config import load
from grpo.console import Console
from grpo.inspect.track import evaluation_of, numbers_of, tracking

pytest.importorskip("trackio")
wandb = pytest.importorskip("wandb")
NOTE = ARTIFACTS / "tiny" / ".track.json"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Weights & Biases writes; nothing leaves the machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads its environment once
    yield tmp_path / "wandb"
    wandb.teardown()


def history(folder: Path) -> list[dict[str, Any]]:
    """What all offline runs in `folder` logged, a step a dictionary, in the order of the runs."""
    wandb.teardown()  # its service may still be writing
    pb: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for data in log_records(path.read_bytes()):
            record = pb.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, as a .wandb file is: blocks of 32 KiB, a record in one part or more."""
    assert content.startswith(b":W&B")
    place, parts = 7, b""  # behind the file's header
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little for a header: padding
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def steps(rows: list[dict[str, Any]]) -> list[int]:
    internal = [row["_step"] for row in rows]
    assert internal == sorted(set(internal))  # else Weights & Biases leaves some out
    return [row["iteration"] for row in rows]


def opened() -> ActiveRun:
    return ActiveRun(ARTIFACTS, load(Path("pipeline.yaml"), ["track=wandb"]), Path.cwd(), Console())


def evaluations(rows: list[dict[str, Any]]) -> list[int]:
    return [row["iteration"] for row in rows if "evaluate/reward" in row]


# ---- what is logged ----


def test_the_numbers_are_those_of_status_and_updates(finished: Path, grpo: Grpo) -> None:
    numbers = numbers_of(opened(), 1)
    [row] = json.loads(grpo("sql", "--json", "select * from updates where iteration = 1")[1])
    status = json.loads(grpo("status", "--json")[1])["iterations"][1]
    assert numbers["reward/mean"] == status["reward"]
    assert numbers["generate/length"] == status["response_tokens"]
    assert {name: numbers[f"seconds/{name}"] for name in status["stage_seconds"]} == pytest.approx(
        status["stage_seconds"]
    )
    for column in (
        "loss",
        "kl",
        "entropy",
        "grad_norm",
        "learning_rate",
        "ratio_max",
        "mismatch_mean",
    ):
        assert numbers[f"update/{column}"] == pytest.approx(row[column]), column
    [code] = json.loads(grpo("sql", "--json", "select avg(value) as v from rewards where iteration = 1")[1])
    assert numbers["rewards/code"] == pytest.approx(code["v"])
    assert numbers["update/steps_skipped"] == 0
    assert not {name for name in numbers if name.endswith(("/iteration", "/step", "/epoch", "/skipped"))}


def test_the_numbers_of_an_evaluation_are_those_of_evals(measured: Path, grpo: Grpo) -> None:
    numbers = evaluation_of(opened(), 2)
    query = "select pass_at[1] as one, pass_at[3] as three, reward from evals where iteration = 2"
    [row] = json.loads(grpo("sql", "--json", query)[1])
    assert numbers["evaluate/pass@1"] == pytest.approx(row["one"])
    assert numbers["evaluate/pass@3"] == pytest.approx(row["three"])
    assert numbers["evaluate/reward"] == pytest.approx(row["reward"])


def test_several_steps_are_their_mean_and_their_largest(project: Path, grpo: Grpo) -> None:
    assert grpo("run", "--until", "1", "--set", "update.epochs=2")[0] == 0
    rows = json.loads(grpo("sql", "--json", "select loss, tokens, ratio_max from updates order by epoch")[1])
    numbers = numbers_of(opened(), 0)
    assert len(rows) == 2
    assert numbers["update/loss"] == pytest.approx(
        (rows[0]["loss"] + rows[1]["loss"]) / 2
    )  # each epoch has all tokens
    assert numbers["update/ratio_max"] == max(row["ratio_max"] for row in rows)


# ---- Weights & Biases ----


def test_wandb_gets_each_iteration_once_however_often_the_run_goes_on(
    finished: Path, grpo: Grpo, offline: Path
) -> None:
    # Two iterations were done before anybody tracked: they are caught up with.
    code, _, err = grpo("run", "--set", "track=wandb", "--set", "iterations=3")
    assert code == 0, err
    assert steps(history(offline)) == [0, 1, 2]
    assert grpo("run", "--set", "track=wandb", "--set", "iterations=3")[0] == 0  # nothing to do
    assert len(list(offline.glob("offline-run-*"))) == 1
    assert grpo("run", "--set", "track=wandb", "--set", "iterations=4")[0] == 0
    rows = history(offline)
    assert steps(rows) == [0, 1, 2, 3]
    assert {path.name.rpartition("-")[2] for path in offline.glob("offline-run-*")} == {"tiny"}  # one run
    for iteration, row in enumerate(rows):
        numbers = numbers_of(opened(), iteration)
        assert {name: row[name] for name in numbers} == pytest.approx(numbers)
    # Done again, an iteration is not logged again: a tracker cannot take a step back.
    assert grpo("run", "--set", "track=wandb", "--set", "iterations=4", "--from", "2", "--yes")[0] == 0
    assert steps(history(offline)) == [0, 1, 2, 3]


def test_wandb_is_sent_no_output_no_code_and_no_errors(finished: Path, grpo: Grpo, offline: Path) -> None:
    assert grpo("run", "--set", "track=wandb")[0] == 0
    [folder] = offline.glob("offline-run-*")
    held = {path.name for path in (folder / "files").rglob("*") if path.is_file()}
    assert held <= {"requirements.txt", "config.yaml", "wandb-summary.json", "wandb-metadata.json"}, held
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_a_tracker_that_fails_does_not_stop_the_training(
    finished: Path, grpo: Grpo, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = wandb.Run.log

    def refuse(tracked: Any, numbers: dict[str, float], step: int) -> None:
        if numbers["iteration"] >= 1:
            raise ConnectionError("the service is down\nsecond line")
        log(tracked, numbers, step=step)

    monkeypatch.setattr(wandb.Run, "log", refuse)
    code, out, err = grpo("run", "--json", "--set", "track=wandb", "--set", "iterations=4")
    lines = err.splitlines()
    failed = "wandb failed at iteration 1: ConnectionError: the service is down"
    assert (code, out) == (8, "")
    assert json.loads(lines[-1])["error"] == (
        f"track: {failed}; the iterations are complete, and the next `grpo run` logs what is missing"
        " (`track: null` goes without)"
    )
    present = json.loads(grpo("status", "--json")[1])["iterations"]
    assert [row["stages"]["update"]["state"] for row in present] == ["done"] * 4  # all committed
    monkeypatch.setattr(wandb.Run, "log", log)
    assert grpo("run", "--set", "track=wandb", "--set", "iterations=4")[0] == 0  # only the tracker is behind
    assert steps(history(offline)) == [0, 1, 2, 3]


def test_a_training_that_fails_says_so_itself(finished: Path, offline: Path) -> None:
    with pytest.raises(ValueError, match="mine"), tracking(opened(), 3):
        raise ValueError("mine")
    assert steps(history(offline)) == [0, 1]  # and what was done is with the tracker


def test_a_tracker_that_cannot_be_opened_ends_the_command_before_anything_is_sampled(
    project: Path, grpo: Grpo, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    code, _, err = grpo("run", "--set", "track=wandb")
    assert code == 8
    line = err.splitlines()[-1]
    assert line.startswith("error: track: wandb cannot be opened: "), line
    assert line.endswith("; nothing was sampled (`track: null` goes without)")
    assert not list(project.glob("artifacts/tiny/iteration=*"))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_missing_package_names_the_command_that_installs_it(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    code, _, err = grpo("run", "--set", f"track={name}")
    assert code == 2
    assert err.endswith(f"error: track: {name}: is not installed; pip install 'grpo-stages[{name}]'\n")
    assert not list(project.glob("artifacts/tiny/iteration=*"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            seal({"wandb": 1}).replace(b"1", b"2", 1),
            "content changed since it was committed (sha256 differs)",
        ),
        (b"", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_damaged_note_is_named_with_the_way_out(
    finished: Path, grpo: Grpo, offline: Path, content: bytes, found: str
) -> None:
    NOTE.write_bytes(content)
    message = (
        f"{NOTE}: {found}; it only notes how far the tracker got: remove it, and the next `grpo run` logs"
        " every iteration again, which the tracker may show twice (`track: null` goes without)"
    )
    code, _, err = grpo("run", "--set", "track=wandb")
    assert (code, err.splitlines()[-1]) == (6, f"error: {message}")
    code, out, _ = grpo("verify")
    assert (code, f"damaged  {message}\n" in out) == (6, True), out
    assert grpo("run")[0] == 0  # without a tracker nobody reads it
    NOTE.unlink()
    assert grpo("run", "--set", "track=wandb")[0] == 0
    assert steps(history(offline)) == [0, 1]


def test_every_evaluation_is_logged_once_the_last_one_too(
    measured_project: Path, grpo: Grpo, offline: Path
) -> None:
    track = ("--set", "track=wandb")
    assert grpo("run", "--until", "1", *track)[0] == 0
    rows = history(offline)
    assert (steps(rows), evaluations(rows)) == ([0, 0, 1], [0, 1])  # policy 0, iteration 0, policy 1
    assert {name: rows[2][name] for name in evaluation_of(opened(), 1)} == pytest.approx(
        evaluation_of(opened(), 1)
    )
    assert grpo("run", "--until", "1", *track)[0] == 0  # nothing to do, and nothing to log
    assert len(list(offline.glob("offline-run-*"))) == 1
    assert grpo("run", *track)[0] == 0  # goes on: that of policy 1 is not logged again
    rows = history(offline)
    assert (steps(rows), evaluations(rows)) == ([0, 0, 1, 1, 2], [0, 1, 2])
    assert rows[3]["reward/mean"] == pytest.approx(numbers_of(opened(), 1)["reward/mean"])


def test_an_evaluation_that_is_missing_with_the_tracker_alone_is_caught_up_with(
    measured: Path, grpo: Grpo, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track, log = ("--set", "track=wandb"), wandb.Run.log

    def refuse(tracked: Any, numbers: dict[str, float], step: int) -> None:
        if numbers["iteration"] == 2:
            raise ConnectionError("the service is down")
        log(tracked, numbers, step=step)

    monkeypatch.setattr(wandb.Run, "log", refuse)
    code, _, err = grpo("run", *track)
    failed = "track: wandb failed at the evaluation of policy 2: ConnectionError: the service is down"
    assert (code, failed in err) == (8, True), err
    monkeypatch.setattr(wandb.Run, "log", log)
    assert grpo("run", *track)[0] == 0
    rows = history(offline)
    assert (steps(rows), evaluations(rows)) == ([0, 0, 1, 1, 2], [0, 1, 2])


def test_an_evaluation_lost_to_a_kill_is_logged_when_it_is_made(
    measured: Path, grpo: Grpo, offline: Path
) -> None:
    """All iterations are done and logged, the last policy is not measured yet: as after a kill."""
    kept = shutil.move("artifacts/tiny/iteration=000002", "aside")
    assert grpo("run", "--set", "evaluate=null", "--set", "track=wandb")[0] == 0
    assert evaluations(history(offline)) == [0, 1]
    assert grpo("run", "--set", "track=wandb")[0] == 0
    rows = history(offline)
    assert (steps(rows), evaluations(rows)) == ([0, 0, 1, 1, 2], [0, 1, 2])
    assert Path(kept).exists()


def test_without_track_nothing_is_noted(finished: Path, grpo: Grpo) -> None:
    """And nothing imported: tests/execute/test_imports.py."""
    assert grpo("run", "--set", "iterations=3")[0] == 0
    assert not NOTE.exists()


# ---- Trackio ----


def test_trackio_gets_each_iteration_once_and_stdout_stays_clean(finished: Path, tmp_path: Path) -> None:
    """In processes of their own: Trackio reads where it writes when it is imported."""
    command = "from grpo.cli import main; main()"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    for iterations in (2, 3):
        options = ["run", "--json", "--set", "track=trackio", "--set", f"iterations={iterations}"]
        done = subprocess.run(
            [sys.executable, "-c", command, *options],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert json.loads(done.stdout)["iterations"] == iterations  # the one document, nothing of Trackio's
    assert "Resumed existing run: tiny" in done.stderr
    [database] = (tmp_path / "trackio").glob("*.db")
    assert database.stem == "project"  # the folder of pipeline.yaml
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("tiny", 0), ("tiny", 1), ("tiny", 2)]
    for iteration, (_, _, metrics) in enumerate(rows):
        assert json.loads(metrics) == pytest.approx(numbers_of(opened(), iteration))
