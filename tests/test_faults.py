"""The process ends, or the operation fails, at the n-th change on disk; and then the same command again."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import crash

pytestmark = pytest.mark.slow
EVERY = {"run": 11, "from": 9, "score": 7, "gc": 3, "fork": 5}  # in the short test


@pytest.fixture(scope="module", params=crash.SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def start(scenario: str, write_project: Callable[[Path], Path], complete: Path, tmp_path: Path) -> Path:
    """The project before the command: not begun, or finished and with something for gc to do."""
    if not crash.SCENARIOS[scenario][0]:
        return write_project(tmp_path / "start")
    folder = crash.copy(complete, tmp_path / "start")
    if scenario == "gc":
        code, err = crash.in_child(folder, ["run", "--from", "1", "--set", crash.NEW_REWARD])
        assert code == 0, err
    return folder


def undisturbed(start: Path, command: list[str], folder: Path) -> tuple[int, dict[str, str]]:
    """How many operations the command does, and what is there after it."""
    crash.copy(start, folder)
    return len(crash.recorded(folder, command)), crash.contents(folder)


def test_killed_at_any_operation_the_same_command_completes_it(
    scenario: str, start: Path, tmp_path: Path
) -> None:
    command = crash.SCENARIOS[scenario][1]
    count, expected = undisturbed(start, command, tmp_path / "undisturbed")
    tried = crash.points(count, EVERY[scenario])
    for number in tried:
        folder = crash.copy(start, tmp_path / "killed")
        code, err = crash.in_child(folder, command, f"kill:{number}")
        assert code == -signal.SIGKILL, (number, err)
        again(scenario, folder, command, expected, number)
    print(f"SIGKILL, {scenario}: {len(tried)} of {count} operations tried, all held")


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EACCES"])
def test_an_operation_that_fails_is_exit_7_and_the_same_command_completes_it(
    scenario: str, error: str, start: Path, tmp_path: Path
) -> None:
    command = crash.SCENARIOS[scenario][1]
    count, expected = undisturbed(start, command, tmp_path / "undisturbed")
    tried = crash.points(count, 3 * EVERY[scenario])
    for number in tried:
        folder = crash.copy(start, tmp_path / "failed")
        code, err = crash.in_child(folder, command, f"{error}:{number}")
        assert code == 7, (number, err)
        assert re.search(
            r"^error: \S+: [A-Z][^;]+; (\d+ MiB free on its disk|free space unknown)$", err, re.M
        ), err
        again(scenario, folder, command, expected, number)
    print(f"{error}, {scenario}: {len(tried)} of {count} operations tried, all held")


def again(scenario: str, folder: Path, command: list[str], expected: dict[str, str], number: int) -> None:
    """The same command again: it completes, and everything is as if it had never been disturbed."""
    code, err = crash.in_child(folder, command)
    if scenario == "fork" and code == 2 and "is there already" in err:
        code = 0  # it was complete before the kill
    assert code == 0, (number, err)
    assert crash.contents(folder) == expected, number
    assert crash.leftovers(folder) == [], number
    code, err = crash.in_child(folder, ["verify", "--json"])
    assert code == 0, (number, err)
