"""The process ends, or the operation fails, at the n-th change on disk; and then the same command again.

`make test` tries one change of each kind (a write, a rename, ...), the others many of all.
"""

import re
import signal
import tempfile
from functools import cache
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import ERRORS, ONE_OF_EACH, TURN, extent

pytestmark = [pytest.mark.slow, pytest.mark.sampled]


@pytest.fixture(params=extent("commands with a fault at an operation"))
def scenario(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@cache
def undisturbed(scenario: str, start: Path) -> tuple[list[crash.Operation], dict[str, str]]:
    """The operations of the command, and what is there after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = crash.copy(start, Path(name, "project"))
        return crash.recorded(folder, crash.SCENARIOS[scenario].command), crash.contents(folder)


def points(operations: list[crash.Operation], every: int | str, first: int = 1) -> list[int]:
    """Numbers of the operations to disturb."""
    if every != ONE_OF_EACH:
        step = min(int(every), len(operations))
        return list(range(1 + (first + TURN) % step, len(operations) + 1, step))
    of_kind: dict[str, list[int]] = {}
    for number, operation in enumerate(operations, 1):
        of_kind.setdefault(operation.kind, []).append(number)
    return sorted(numbers[len(numbers) // 2] for numbers in of_kind.values())


def test_killed_at_any_operation_the_same_command_completes_it(
    scenario: str, start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    command = crash.SCENARIOS[scenario].command
    operations, expected = undisturbed(scenario, start)
    tally = new_tally("SIGKILL at an operation", scenario, len(operations))
    for number in points(operations, extent("operations with SIGKILL")):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "killed")
            code, err = crash.in_child(folder, command, f"kill:{number}")
            assert code == -signal.SIGKILL, (number, err)
            code, out, _ = crash.Child(folder, [["verify"]]).wait()
            is_new = crash.SCENARIOS[scenario].before is None
            assert code == 0 or (code == 2 and is_new), (number, out)  # 2: there is no run yet
            again(folder, command, expected, number)


@pytest.mark.parametrize("scenario", ["from"])
def test_killed_while_from_moves_what_it_redoes_nothing_is_damaged(
    scenario: str, start: Path, tmp_path: Path
) -> None:
    command = crash.SCENARIOS[scenario].command
    operations, _ = undisturbed(scenario, start)
    moves = [number for number, each in enumerate(operations, 1) if "start_over" in each.place]
    for number in range(moves[0], moves[-1] + 2, 2):  # a move is three operations
        folder = crash.copy(start, tmp_path / "killed")
        assert crash.in_child(folder, command, f"kill:{number}")[0] == -signal.SIGKILL
        code, out, _ = crash.Child(folder, [["verify"]]).wait()
        assert code == 0, (number, out)


@pytest.mark.parametrize("scenario", ["rounds"])
def test_killed_between_rounds_no_shard_is_made_again(
    scenario: str, start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    command = crash.SCENARIOS[scenario].command
    operations, expected = undisturbed(scenario, start)
    tally = new_tally("SIGKILL at an operation", scenario, len(operations))
    for number in points(operations, extent("operations with SIGKILL in `rounds`")):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "killed")
            code, err = crash.in_child(folder, command, f"kill:{number}")
            assert code == -signal.SIGKILL, (number, err)
            before = set(crash.finished_shards(folder).values())
            again(folder, command, expected, number)
            assert before <= set(crash.finished_shards(folder).values()), number


@pytest.mark.parametrize("kind", extent("errors"))
def test_an_operation_that_fails_is_exit_7_and_the_same_command_completes_it(
    scenario: str, kind: str, start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    """The errors take turns: in the long test every third operation fails in one of the three ways."""
    command = crash.SCENARIOS[scenario].command
    operations, expected = undisturbed(scenario, start)
    tally = new_tally(f"{kind} at an operation", scenario, len(operations))
    first = 1 + 3 * ERRORS.index(kind)
    for number in points(operations, extent("operations with each error"), first):
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
