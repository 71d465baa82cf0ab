"""`grpo doctor --shared`: two commands of this machine in the place of two machines."""

import errno
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import ResourceError
from grpo.manage.doctor import meeting, shared
from grpo.manage.doctor.meeting import Meeting

# What a file system does to one of them, at the calls of the system; and short patience.
PROGRAM = """
import errno, fcntl, os, sys
from grpo.cli import main
from grpo.manage.doctor import meeting
meeting.PATIENCE_S = {patience}
def refuse(*given, **named):
    raise OSError({number}, os.strerror({number}), str(given[0]))
{fault}
sys.argv = ["grpo", "doctor", "--shared", *sys.argv[1:]]
main()
"""
FAULTS = {
    "": "",
    "no locks": "fcntl.flock = refuse",
    "own locks": "fcntl.flock = lambda *given: None",
    "no links": "os.link = refuse",
}


def start(fault: str = "", *more: str, number: int = errno.ENOLCK, patience: float = 30) -> Any:
    program = PROGRAM.format(fault=FAULTS[fault], number=number, patience=patience)
    command = [sys.executable, "-c", program, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def both(fault: str = "", number: int = errno.ENOLCK) -> tuple[int, dict[str, Any]]:
    """(exit code, checks) of two commands, which agree; the fault is of both."""
    two = [start(fault, "--json", number=number) for _ in range(2)]
    said = [each.communicate(timeout=300) for each in two]
    assert [err for _, err in said] == ["", ""]
    documents = [json.loads(out) for out, _ in said]
    assert documents[0] == documents[1]
    assert two[0].returncode == two[1].returncode == documents[0]["exit"]
    assert not Path("artifacts/.doctor-shared").exists()
    return two[0].returncode, {check["name"]: check for check in documents[0]["checks"]}


@pytest.mark.slow
def test_what_holds_on_this_machine(project: Path) -> None:
    code, checks = both()
    assert code == 0
    assert [name for name, check in checks.items() if check["level"] != "ok"] == ["machines"]
    assert "both are this machine" in checks["machines"]["note"]
    assert checks["lock"]["found"] == "refused to the second one, until it is free"
    assert checks["rename"]["found"].startswith("whole in all of ")
    assert checks["create"]["found"].endswith(" of 40, none twice")
    assert list(checks) == ["machines", "names", "lock", "rename", "create", "hard link", "fsync"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "number", "check", "level", "note"),
    [
        ("no locks", errno.ENOLCK, "lock", "failed", "no locks on this file system"),
        ("own locks", 0, "lock", "warning", "kept out by the lease in the run's folder alone"),
        ("no links", errno.EPERM, "hard link", "warning", "Operation not permitted"),
    ],
)
def test_what_does_not_hold(
    project: Path, fault: str, number: int, check: str, level: str, note: str
) -> None:
    code, checks = both(fault, number)
    assert (checks[check]["level"], note in checks[check]["note"]) == (level, True), checks[check]
    assert code == (7 if level == "failed" else 0)
    others = {name for name, found in checks.items() if found["level"] != "ok"}
    assert others == {"machines", check}


def test_one_alone_says_that_no_other_has_come(project: Path) -> None:
    alone = start(patience=0.5)
    out, err = alone.communicate(timeout=300)
    assert (alone.returncode, out) == (7, "")
    assert err.startswith("error: artifacts/.doctor-shared: no second one has come in 0 s; start two at the")
    assert not Path("artifacts/.doctor-shared").exists()


def test_what_a_killed_one_left_is_removed(project: Path) -> None:
    place = Path("artifacts/.doctor-shared")
    place.mkdir(parents=True)
    (place / "first").write_text("token")
    late = start(patience=0.5)
    out, err = late.communicate(timeout=300)
    assert (late.returncode, out) == (7, "")
    assert "a command that was killed has left it, and it is removed; start two" in err
    assert not place.exists()


def test_who_reads_ends_with_the_one_that_writes(tmp_path: Path) -> None:
    """The first one is killed between two versions: its folder goes, or it says nothing more."""
    place = tmp_path / "meeting"
    place.mkdir()
    (place / "first").write_text("token")
    (place / "token-first-hello").write_text('{"host": "one", "kernel": "its own"}')
    (place / "token-first-value").write_text("{}")
    second = Meeting(place)

    def end() -> None:
        until = time.monotonic() + 60
        while not second.place("second-reading").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        shutil.rmtree(place)

    with ThreadPoolExecutor(1) as beside:
        ended = beside.submit(end)
        with pytest.raises(ResourceError, match="the other one has ended; what it says is why"):
            shared._rename_second(second)
        ended.result()


def test_a_third_is_refused_and_disturbs_nothing(project: Path) -> None:
    place = Path("artifacts/.doctor-shared")
    place.mkdir(parents=True)
    (place / "first").write_text("token")
    (place / "token-second-hello").write_text("{}")
    third = start()
    _, err = third.communicate(timeout=300)
    assert (third.returncode, "two are here already" in err) == (2, True), err
    assert (place / "first").exists()
    assert meeting.PATIENCE_S == 30
