"""The process ends, or the operation fails, at the n-th change on disk; and then the same command again."""

import re
import signal
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import LONG, chosen

pytestmark = pytest.mark.slow
EVERY = 9  # in the short test
ERRORS = ("ENOSPC", "EIO", "EACCES")


@pytest.fixture(params=("run", "next", "from", "score", "evaluate", "gc", "fork"))
def scenario(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def undisturbed(start: Path, command: list[str], folder: Path) -> tuple[int, dict[str, str]]:
    """How many operations the command does, and what is there after it."""
    crash.copy(start, folder)
    return len(crash.recorded(folder, command)), crash.contents(folder)


def test_killed_at_any_operation_the_same_command_completes_it(
    scenario: str, start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    command = crash.SCENARIOS[scenario].command
    count, expected = undisturbed(start, command, tmp_path / "undisturbed")
    tally = new_tally("SIGKILL at an operation", scenario, count)
    for number in chosen(count, EVERY):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "killed")
            code, err = crash.in_child(folder, command, f"kill:{number}")
            assert code == -signal.SIGKILL, (number, err)
            again(folder, command, expected, number)


@pytest.mark.parametrize("scenario", ["rounds"])
def test_killed_between_rounds_no_shard_is_made_again(
    scenario: str, start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    command = crash.SCENARIOS[scenario].command
    count, expected = undisturbed(start, command, tmp_path / "undisturbed")
    tally = new_tally("SIGKILL at an operation", scenario, count)
    for number in chosen(count, 4 * EVERY):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "killed")
            code, err = crash.in_child(folder, command, f"kill:{number}")
            assert code == -signal.SIGKILL, (number, err)
            before = set(crash.finished_shards(folder).values())
            again(folder, command, expected, number)
            assert before <= set(crash.finished_shards(folder).values()), number


@pytest.mark.parametrize("kind", ERRORS)
def test_an_operation_that_fails_is_exit_7_and_the_same_command_completes_it(
    scenario: str, kind: str, start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    """The errors take turns: in the long test every third operation fails in one of the three ways."""
    command = crash.SCENARIOS[scenario].command
    count, expected = undisturbed(start, command, tmp_path / "undisturbed")
    tally = new_tally(f"{kind} at an operation", scenario, count)
    turn = ERRORS.index(kind)
    for number in range(1 + 3 * turn, count + 1, 9 if LONG else 3 * EVERY):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "failed")
            code, err = crash.in_child(folder, command, f"{kind}:{number}")
            assert code == 7, (number, err)
            found = r"^error: \S+: [A-Z][^;]+; (\d+ MiB free on its disk|free space unknown)$"
            assert re.search(found, err, re.M), err
            again(folder, command, expected, number)


def again(folder: Path, command: list[str], expected: dict[str, str], number: int) -> None:
    """The same command again: it completes, and everything is as if it had never been disturbed."""
    code, _, err = crash.Child(folder, [command, ["verify"]]).wait()
    if command[0] == "fork" and code == 2 and "is there already" in err:
        code, err = crash.in_child(folder, ["verify"])  # it was complete before the kill
    assert code == 0, (number, err)
    assert crash.contents(folder) == expected, number
    assert crash.leftovers(folder) == [], number
