"""Killed, cut off, locked out: what is committed stays, and the next command completes the mirror."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from tests import forked
from tests.conftest import Grpo, run_cli
from tests.mirror.s3 import Bucket, Server
from tests.mirror.test_mirroring import RUN, committed, mirrored, succeed, to

from grpo.artifacts import lease
from grpo.errors import ResourceError
from grpo.mirror import driver, upload
from grpo.mirror.layout import Place
from grpo.mirror.upload import Upload

PROGRAM = "from grpo.cli import main; main()"
SLOW = """
import time
def code(prompts, completions, **columns):
    open("scoring", "w").close()
    time.sleep(60)
    return [0.0] * len(prompts)
"""
# Requests at which a command is killed: before or behind the first write whose key matches.
POINTS = {
    "before the first file": ("before", r"/prompts-\w+/part"),
    "between two files": ("before", r"iteration=000001/update-.*logprobs"),
    "between files and manifest": ("before", "iteration=000001/rollouts/manifest.json"),
    "behind a manifest": ("after", "iteration=000000/rewards/manifest.json"),
    "at a checkpoint's manifest": ("before", "iteration=000000/checkpoint/manifest.json"),
    "as the lease is released": ("before", "lease.json"),
}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(*arguments: str) -> forked.Process:
    """A command to be killed, from a process that has not used the store's client."""
    child = forked.CONTEXT.Process(target=run_cli, args=arguments)
    child.start()
    return child


def kill(child: forked.Process) -> None:
    """Also from the thread that answers it."""
    child.kill()
    wait([child.sentinel])


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_command_is_completed_by_the_next(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server, point: str
) -> None:
    when, pattern = POINTS[point]
    killed: list[str] = []

    def look(method: str, key: str) -> int | None:
        if method not in ("PUT", "DELETE") or not re.search(pattern, key) or killed:
            return None
        if key.endswith("lease.json") and not is_last(bucket):
            return None
        killed.append(key)
        kill(child)
        return 503

    setattr(server, when, look)
    child = begin("run", *to(bucket))
    child.join(120)
    assert (child.exitcode, len(killed)) == (-signal.SIGKILL, 1)
    server.reset()
    whole = [key for key in bucket.names() if key.endswith("/manifest.json")]
    for key in whole:  # each that is there counts files that are there
        manifest, base = json.loads(bucket.read(key)), key.removesuffix("/manifest.json")
        for file in manifest["files"]:
            place = str(Path(f"{base}-{manifest['fingerprint'][:16]}", file["part"], file["name"]))
            assert len(bucket.read(place)) == file["bytes"]
    err = succeed(grpo, "run", *to(bucket))
    assert "in use by" not in err  # its own epoch, and the run's lock says that it is over
    assert mirrored(bucket) == committed()


def is_last(bucket: Bucket) -> bool:
    """Whether all of the run is there: what is written then is the lease's end."""
    return "runs/tiny/iteration=000001/checkpoint/manifest.json" in bucket.names()


def test_a_command_killed_in_the_middle_of_a_removal_is_completed(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server
) -> None:
    succeed(grpo, "run", *to(bucket))
    removals: list[str] = []

    def look(method: str, key: str) -> int | None:
        if method == "POST":  # a removal
            removals.append(key)
        if len(removals) < 2:
            return None
        kill(child)
        return 503

    server.before = look
    child = begin("gc", "--checkpoints", *to(bucket))
    child.join(120)
    server.reset()
    assert child.exitcode == -signal.SIGKILL
    assert "runs/tiny/iteration=000000/checkpoint/manifest.json" not in bucket.names()  # it went first
    succeed(grpo, "gc", *to(bucket))
    assert mirrored(bucket) == committed()


def test_no_network_at_the_beginning_is_exit_7_in_one_line_and_nothing_is_begun(
    project: Path, grpo: Grpo, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(driver, "_LEASE_PATIENCE_S", 0.3)
    code, _, err = grpo("run", *to(bucket))
    assert (code, err.count("\n")) == (7, 1), err
    assert err.startswith(f"error: s3://{bucket.name}/runs/tiny/lease.json: the store does not answer as it")
    assert not list(RUN.glob("iteration=*"))


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of the mirror are given up at once."""
    opened = driver.opened

    def quickly(address: str, run: str, epoch: str) -> object:
        store, held = opened(address, run, epoch)
        return type(store)(address, 3), held

    monkeypatch.setattr(driver, "opened", quickly)


def test_a_failure_in_the_middle_is_raised_at_the_next_border_and_what_is_committed_stays(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    server.before = lambda method, key: 403 if "iteration=000000/rollouts-" in key else None
    code, _, err = grpo("run", *to(bucket))
    assert code == 7, err
    last = err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: s3://{bucket.name}/runs/tiny/iteration=000000/rollouts-.*access denied.*", last
    )
    assert (RUN / "iteration=000000" / "rollouts" / "manifest.json").exists()
    server.reset()
    succeed(grpo, "verify")
    err = succeed(grpo, "run", *to(bucket))
    assert "outputs behind; they are copied first" in err
    assert mirrored(bucket) == committed()


def test_a_failure_at_the_end_is_exit_7_though_all_is_done(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    server.before = lambda method, key: 503 if "iteration=000001/update-" in key else None
    code, _, err = grpo("run", *to(bucket))
    assert (code, "the store does not answer as it should" in err.splitlines()[-1]) == (7, True), err
    server.reset()
    succeed(grpo, "run", *to(bucket))
    assert mirrored(bucket) == committed()


def test_a_stage_that_fails_says_so_and_what_was_committed_is_copied(
    project: Path, grpo: Grpo, bucket: Bucket
) -> None:
    Path("reward.py").write_text("def code(prompts, completions, **columns):\n    raise ValueError\n")
    code, _, err = grpo("run", *to(bucket))
    assert (code, "rewards failed" in err or "failed" in err) == (8, True), err
    assert mirrored(bucket) == committed()
    assert any("iteration=000000/rollouts-" in key for key in mirrored(bucket))


def test_the_second_driver_names_the_first(
    finished: Path,
    grpo: Grpo,
    bucket: Bucket,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # The first is held in the middle of its copying, and goes on to renew; the second is in another folder.
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    renewing = f"from grpo.artifacts import lease; lease.RENEW_S = 0.2; {PROGRAM}"
    held: list[str] = []

    def look(method: str, key: str) -> int | None:
        if "iteration=000001/update-" not in key:
            return None
        held.append(key)
        done.wait(60)
        return None

    done = threading.Event()
    server.before = look
    command = [sys.executable, "-c", renewing, "run", *to(bucket)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        while not held:
            assert first.poll() is None
            time.sleep(0.05)
        monkeypatch.chdir(other)
        code, _, err = grpo("run", *to(bucket))
        assert code == 5, err
        place, who = f"s3://{bucket.name}/runs/tiny/lease.json", rf"pid {first.pid} on \S+ since \S+"
        assert re.search(f"^error: {place}: in use by {who}; wait for it, or stop it$", err, re.MULTILINE), (
            err
        )
        done.set()
        _, said = first.communicate(timeout=60)
        assert first.returncode == 0, said
    monkeypatch.chdir(finished.parent / "project")
    assert mirrored(bucket) == committed()


def test_a_copy_of_the_folder_is_another_driver(
    finished: Path, grpo: Grpo, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    succeed(grpo, "run", *to(bucket))
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    held = json.loads(bucket.read("runs/tiny/lease.json"))
    bucket.write("runs/tiny/lease.json", json.dumps({**held, "released": False}).encode())
    waited: list[float] = []
    monkeypatch.setattr(driver, "CLOCK", lease.Clock(lambda: sum(waited), waited.append))
    assert "in use by" not in succeed(grpo, "run", *to(bucket))  # whose lock says that nobody else is there
    bucket.write("runs/tiny/lease.json", json.dumps({**held, "released": False}).encode())
    monkeypatch.chdir(other)
    assert f"mirror: in use by pid {held['pid']} on " in succeed(grpo, "run", *to(bucket))
    assert sum(waited) >= lease.LAPSE_S
    assert mirrored(bucket) == committed()


def test_a_second_signal_ends_the_copying_at_once(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server
) -> None:
    held: list[str] = []
    done = threading.Event()

    def look(method: str, key: str) -> int | None:
        if "iteration=000001/update-" in key:
            held.append(key)
            done.wait(60)
        return None

    server.before = look
    with start("run", *to(bucket)) as child:
        while not held:
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.stderr is not None
        assert any("once more to stop now" in line for line in child.stderr)
        assert child.poll() is None  # it copies what is left
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) == 128 + signal.SIGTERM
    done.set()
    server.reset()
    succeed(grpo, "run", *to(bucket))
    assert mirrored(bucket) == committed()


def test_a_second_signal_within_a_stage_waits_for_no_copying(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server
) -> None:
    Path("reward.py").write_text(SLOW)
    held, done = list[str](), threading.Event()

    def look(method: str, key: str) -> int | None:
        if "iteration=000000/rollouts-" in key:
            held.append(key)
            done.wait(60)
        return None

    server.before = look
    with start("run", *to(bucket)) as child:
        while not (held and Path("scoring").exists()):
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.stderr is not None
        assert any("once more to stop now" in line for line in child.stderr)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=20) == 128 + signal.SIGTERM
    done.set()


def test_a_command_that_cannot_begin_lets_go_of_the_lease(
    finished: Path, grpo: Grpo, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(upload: Upload) -> list[Place]:
        raise ResourceError("no")

    with monkeypatch.context() as patched:
        patched.setattr(Upload, "behind", failing)
        assert grpo("run", *to(bucket))[0] == 7
    assert json.loads(bucket.read("runs/tiny/lease.json"))["released"]


def test_a_zombie_commits_nothing(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server, tmp_path: Path
) -> None:
    # In the middle of its copying another one takes the lease: nothing of it is there from then on.
    taken: list[str] = []

    def look(method: str, key: str) -> int | None:
        if method == "PUT" and "iteration=000001/rewards-" in key and not taken:
            held = json.loads(bucket.read("runs/tiny/lease.json"))
            content = json.dumps({**held, "host": "elsewhere", "pid": 7, "epoch": "other"})
            bucket.write("runs/tiny/lease.json", content.encode())
            taken.append(key)
        return None

    server.before = look
    code, _, err = grpo("run", *to(bucket))
    assert (code, len(taken)) == (5, 1), err
    expected = (
        r"error: .*/lease.json: taken over by pid 7 on elsewhere since .*; mirroring stopped, and what is"
    )
    assert re.search(expected, err), err
    assert "runs/tiny/iteration=000001/rewards/manifest.json" not in bucket.names()
    assert json.loads(bucket.read("runs/tiny/lease.json"))["epoch"] == "other"


def test_a_manifest_that_another_one_wrote_is_not_replaced(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server
) -> None:
    succeed(grpo, "run", *to(bucket))
    key = "runs/tiny/iteration=000001/rewards/manifest.json"
    other = bucket.read(key) + b"\n"

    def look(method: str, at: str) -> int | None:
        if method == "PUT" and "iteration=000001/rewards-" in at:
            bucket.write(key, other)
        return None

    server.before = look
    code, _, err = grpo("score", "--iteration", "1", "--force", *to(bucket))
    assert (code, f"{key}: written by another command; mirroring stopped" in err) == (5, True), err
    assert bucket.read(key) == other


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_store_without_conditions_is_refused(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server, header: str
) -> None:
    server.ignores = {header}
    code, _, err = grpo("run", *to(bucket))
    expected = f"error: s3://{bucket.name}/runs: the store ignores {header}, so two commands could write one"
    assert (code, err.startswith(expected), err.count("\n")) == (2, True, 1), err
    assert not list(RUN.glob("iteration=*"))


MISSING: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "no credentials": lambda patch: patch.delenv("AWS_SECRET_ACCESS_KEY"),
    "obstore: is not installed; pip install 'grpo-stages[mirror]'": lambda patch: patch.setitem(
        sys.modules, "obstore", None
    ),
}


@pytest.mark.parametrize("expected", MISSING)
@pytest.mark.parametrize("command", [["run"], ["restore", "s3://bucket/runs/tiny"]], ids=" ".join)
def test_what_is_missing_is_said_in_one_line(
    project: Path,
    grpo: Grpo,
    bucket: Bucket,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    expected: str,
    command: list[str],
) -> None:
    MISSING[expected](monkeypatch)
    code, _, err = grpo(*command, *(to(bucket) if command == ["run"] else []))
    assert (code, err.count("\n"), expected in err) == (2, 1, True), err
    assert server.seen == []


def test_a_file_that_changed_here_is_not_copied(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    path = next((RUN / "iteration=000001" / "rewards").glob("part-*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, _, err = grpo("run", *to(bucket))
    assert code == 6
    assert f"{path}: content changed since it was committed (sha256 differs)" in err
    assert "runs/tiny/iteration=000001/rewards/manifest.json" not in bucket.names()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_of_the_copier_is_no_success(
    finished: Path, grpo: Grpo, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(upload.Upload, "copy", fail)
    with pytest.raises(AssertionError, match="has ended before its time"):
        grpo("run", *to(bucket))
