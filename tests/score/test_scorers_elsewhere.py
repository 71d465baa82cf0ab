"""Reward functions in scorers of their own: the files of one process, whatever ends them or is wrong."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.faults import crash
from tests.score.judge.endpoint import says, serve
from tests.score.test_score_stage import calls, failed, inodes, opened, reward, rows, scored

from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.console import Console
from grpo.errors import EngineError, UsageError
from grpo.execute import Pool, Worker
from grpo.execute.processes import Process
from grpo.score import shard_rows
from grpo.score.functions import modules
from grpo.score.functions.modules import Modules
from grpo.score.functions.workspace import Workspace

TWO = {"scorers": {"count": 2}}
# Beside reward.py, which test_score_stage writes: it imports a module, in a folder, of its own.
MORE = """
import os, signal
from shared.near import values


def all_kinds(completions, answer, level, **columns):
    print("level", *level)
    if "34" in completions:
        os._exit(3)
    if "five" in completions:
        os.kill(os.getpid(), signal.SIGKILL)
    found = {"7": values(level)[0], "5": {"a": 1}, "": float("nan"), "10": None}
    return [found[text] for text in completions]


def kills_its_scorer(completions):
    if "5" in completions:
        os.kill(os.getppid(), signal.SIGKILL)
    return [1.0 for _ in completions]
"""
LATE = reward("hangs_on_words", timeout_s=0.5)
ALL_KINDS = (
    {"function": "more:all_kinds"},
    reward("every_status", weight=0.5),
    LATE,
    {**LATE, "name": "late", "on_timeout": 0.25},
    reward("weighted", arguments={"bonus": 100.0}),
    {"function": "exact_answer"},
)


def project_in(folder: Path, *rewards: dict[str, Any], execution: Any = None, **score: Any) -> ActiveRun:
    """As opened(), with `execution` and modules beside it."""
    run = opened(folder, *rewards, **score)
    (folder / "shared").mkdir(exist_ok=True)
    (folder / "shared" / "near.py").write_text("def values(levels):\n    return [2.0 * n for n in levels]\n")
    (folder / "more.py").write_text(MORE)
    config = Config.model_validate({**run.config.model_dump(), "execution": execution})
    return ActiveRun(run.root, config, folder, Console(quiet=True))


def files_of(run: ActiveRun) -> tuple[Any, dict[str, str]]:
    """Name, rows, labels and sha256 of each file of the rewards, and their ids."""
    manifest = run.manifest("rewards", 0)
    assert manifest is not None
    return [file.model_dump() for file in manifest.files], manifest.ids


def processes_of(folder: Path) -> list[str]:
    """What is left of processes that call functions: they have written where they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SCORED_IN={folder}".encode() in path.read_bytes():
                found.append(path.parent.joinpath("cmdline").read_text())
        except OSError:
            continue
    return [text for text in found if text]  # the others have ended, and were not waited for


def wait_for_none_of(folder: Path) -> None:
    until = time.monotonic() + 20
    while left := processes_of(folder):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_rewards_are_those_of_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With errors, deaths, time-outs and a judge; functions print, and none of it is in twice."""
    before = set(multiprocessing.active_children())
    with serve(lambda question, request: says(f"Score: {len(question)}")) as endpoint:
        judge = {"judge": {"url": endpoint.url, "model": "judge-1", "rubric": "Rate {response}"}}
        one, other = (
            project_in(tmp_path / name, *ALL_KINDS, judge, execution=execution)
            for name, execution in (("one", None), ("other", TWO))
        )
        message = failed(one)
        printed = capfd.readouterr().err.splitlines()
        assert failed(other) == message
    assert files_of(other) == files_of(one)
    assert {row["status"] for row in rows(one)} == {
        "ok", "error", "timeout", "nonfinite", "not_applicable"
    }  # fmt: skip
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(printed)
    assert printed.count("level 2 2") == 1  # a group whose call fails is tried again, a rollout at a time
    assert set(multiprocessing.active_children()) <= before
    assert [file.table for file in other.manifest("rewards", 0).files].count("judgements") == 2  # type: ignore[union-attr]


def test_what_an_earlier_output_has_is_not_scored_again(tmp_path: Path) -> None:
    first = scored(project_in(tmp_path, reward("length"), reward("other"), execution=TWO))
    kept = inodes(run := project_in(tmp_path, reward("length")), first, "other")
    calls(tmp_path, "length")
    (tmp_path / "broken").touch()
    three = (reward("length", weight=0.5), reward("other"), reward("fails_on_words"))
    run = project_in(tmp_path, *three, execution=TWO)
    assert "1 of 18 rewards failed" in failed(run, force=True)
    assert calls(tmp_path, "length") == []  # another weight: its rows alone are written anew
    assert inodes(run, run.require("rewards", 0, ""), "other") == kept
    (tmp_path / "broken").unlink()
    calls(tmp_path, "fails_on_words")
    scored(run)
    assert calls(tmp_path, "fails_on_words") == [1]  # the row that failed


def test_a_killed_scorer_costs_its_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = [reward("length", name=f"length {number}") for number in range(3)]
    one = project_in(tmp_path / "one", *rewards)
    scored(one)
    killed: list[int] = []
    answer_of = Pool._answer_of

    def kill_the_other(pool: Pool, now: Any, worker: Worker, what: str) -> Any:
        for other in {*pool._busy} - {worker} if len(killed) < 2 else []:
            assert isinstance(other, Process)
            assert other.pid is not None
            os.kill(other.pid, signal.SIGKILL)
            killed.append(other.pid)
        return answer_of(pool, now, worker, what)

    monkeypatch.setattr(Pool, "_answer_of", kill_the_other)
    other = project_in(tmp_path / "other", *rewards, execution=TWO)
    scored(other)
    assert killed
    assert files_of(other) == files_of(one)
    # Groups of 2: 9 calls, and again at most the two of each shard that was under way.
    assert 9 <= len(calls(tmp_path / "other", "length")) <= 9 + 2 * len(killed)


def test_a_shard_that_ends_every_scorer_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORED_IN", str(tmp_path))
    two = (reward("length"), {"function": "more:kills_its_scorer"})
    run = project_in(tmp_path, *two, execution={"scorers": {"count": 1}})
    with pytest.raises(EngineError) as caught:
        scored(run)
    message = str(caught.value)
    assert message.startswith("score 0: kills_its_scorer/part-00002-"), message
    assert "(by SIGKILL) ended 3 workers, one after the other" in message
    assert [path.name[:10] for path in sorted(run.path.rglob("*.parquet")) if "rewards" in str(path)] == [
        "part-00000", "part-00001", "part-00003"
    ]  # fmt: skip
    wait_for_none_of(tmp_path)


def begun(project: Path, source: str, until_there: str) -> subprocess.Popen[str]:
    """`grpo run` of a function and a quick one, as soon as a file of that name is there."""
    (project / "reward.py").write_text(source)
    rewards = "score.rewards=[{function: 'reward:code'}, {function: 'reward:quick'}]"
    command = ["run", "--set", rewards, "--set", "generate.rollouts_per_shard=2"]
    program = (
        "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from grpo.cli import main; main()"
    )
    environment = {**os.environ, "SCORED_IN": str(project)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command, "--set", "execution={scorers: {count: 2}}"],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not list(project.rglob(until_there)):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


SLOW = """
import time

def code(completions):
    with open("begun", "w"):
        time.sleep({seconds})
    return [float(len(text)) for text in completions]

def quick(completions):
    return [1.0 for _ in completions]
"""


@pytest.mark.slow
def test_a_signal_ends_it_after_what_is_under_way(project: Path) -> None:
    process = begun(project, SLOW.format(seconds=1.5), "rewards-*/*.parquet")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.splitlines()[-1].startswith("error: interrupted: what is committed is kept")
    # The first two of six shards, and what was begun meanwhile: no time for a quick one.
    staged = {path.name[:10] for path in project.rglob("rewards-*/*.parquet")}
    assert {"part-00000", "part-00001"} <= staged <= {f"part-0000{n}" for n in range(4)}
    wait_for_none_of(project)


@pytest.mark.slow
def test_the_second_signal_ends_it_at_once_and_all_processes(project: Path) -> None:
    process = begun(project, SLOW.format(seconds=600), "begun")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("error: interrupted: what is committed is kept")
    wait_for_none_of(project)


@pytest.mark.slow
def test_no_process_stays_behind_a_driver_that_is_killed(project: Path) -> None:
    process = begun(project, SLOW.format(seconds=600), "begun")
    process.kill()
    process.communicate(timeout=60)
    wait_for_none_of(project)


def test_a_run_and_its_evaluations(measured_project: Path, grpo: Grpo) -> None:
    def contents() -> dict[str, str]:
        return {name.partition("/")[2]: held for name, held in crash.contents(measured_project).items()}

    assert grpo("run")[0] == 0
    one = contents()
    (measured_project / "artifacts").rename(measured_project.parent / "alone")
    code, _, err = grpo("run", "--set", "execution={scorers: {count: 2}}")
    assert code == 0, err
    assert contents() == one
    assert grpo("run")[2].endswith("nothing to do\n")  # where it was scored is in no fingerprint


# ---- modules ----


def test_an_edit_after_planning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project_in(tmp_path, reward("length"), execution=TWO)
    submit = Process.submit

    def edited(worker: Process, job: Any) -> None:
        with (tmp_path / "reward.py").open("a") as file:
            file.write("\n# edited\n")
        submit(worker, job)

    monkeypatch.setattr(Process, "submit", edited)
    monkeypatch.setattr(shard_rows, "require_source", lambda *given: None)  # the driver's own look
    with pytest.raises(UsageError, match=r"'reward:length': on \S+ \S+reward.py is not the file that"):
        scored(run)


def test_modules_are_the_python_files_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["reward.py", "shared/near.py", "shared/fast.abi3.so"]
    left_out = ["p.jsonl", ".git/x.py", "env/lib/y.py", "artifacts/r/z.py", "shared/__pycache__/near.pyc"]
    for name in [*names, *left_out]:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    folder = tmp_path / "project"
    (folder / "env" / "pyvenv.cfg").touch()
    (folder / "around").symlink_to(folder)  # it would never end
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "far.py").touch()
    (folder / "linked").symlink_to(tmp_path / "linked")
    found = Modules.of(folder, folder / "artifacts")
    assert sorted(found.files) == sorted([*names, "linked/far.py"])
    workspace = Workspace()
    try:
        assert found.arrive(workspace) == folder  # with what else is there
        (folder / "reward.py").write_text("# another\n")
        there = found.arrive(workspace)
        assert there == workspace.folder / "modules"
        assert (there / "reward.py").read_text() == "# reward.py\n"
        assert (there / "shared" / "near.py").read_text() == "# shared/near.py\n"
        damaged = found._replace(files={**found.files, "reward.py": b"# reward"})
        with pytest.raises(EngineError, match=r"came to \S+ damaged \(sha256 differs\)"):
            damaged.arrive(workspace)
    finally:
        workspace.close()
    monkeypatch.setattr(modules, "MAX_MIB", 1e-5)  # ten bytes
    with pytest.raises(UsageError, match=r"the Python files below \S+project are more than 1e-05 MiB"):
        Modules.of(folder, folder / "artifacts")


def test_without_it_nothing_of_it_is_imported() -> None:
    code = "import sys, grpo.score.stage; print({'grpo.score.scorer_pool', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_doctor_looks_at_them(project: Path, grpo: Grpo) -> None:
    code, out, err = grpo("doctor", "--json", "--set", "execution={scorers: {count: 2}}")
    assert code == 0, err
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert "execution" not in found  # this process samples
    assert found["execution.scorers"]["found"] == "2 scorers, local"
    assert found["execution.scorers"]["needed"] == "1 cores each"
