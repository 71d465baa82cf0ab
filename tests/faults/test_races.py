"""Two at once: two writers, of which one waits for nobody; and readers while everything is replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import extent

pytestmark = [pytest.mark.slow, pytest.mark.sampled]
RACES = extent("two writers at once, each pair")
QUERIES = extent("queries of a reader")


@pytest.mark.parametrize("other", [["run"], ["generate", "--iteration", "0"]], ids=["run", "generate"])
def test_one_of_two_writers_works_and_the_other_says_who(
    other: list[str], write_project: Callable[[Path], Path], tmp_path: Path, new_tally: NewTally
) -> None:
    start = write_project(tmp_path / "start")
    tally = new_tally("two writers at once", f"run and {other[0]}", RACES)
    refused = 0
    for _ in range(RACES):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "race")
            children = [crash.Child(folder, [command]) for command in (["run"], other)]
            ends = [child.wait() for child in children]
            for (code, _, err), rival in zip(ends, reversed(children), strict=True):
                assert code in (0, 5), err
                if code == 5:
                    refused += 1
                    assert f"in use by pid {rival.pid} on " in err
            assert [code for code, _, _ in ends].count(5) <= 1
            crash.succeed(folder, "run")
            crash.succeed(folder, "verify")
    assert refused > RACES // 2  # else they hardly met


def test_a_reader_sees_the_old_or_the_new_and_nothing_between(
    complete: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    folder = crash.copy(complete, tmp_path / "project")
    query = [
        "sql",
        "select name, count(*), sum(value) from rewards where iteration = 0 group by all",
        "--json",
    ]
    commands = [
        ["score", "--iteration", "0", "--force", "--set", f"score.rewards=[{{function: 'reward:{name}'}}]"]
        for name in ("code", "length")
    ]
    right = set()
    for command in commands:
        crash.succeed(folder, *command)
        crash.succeed(folder, *query, "--out", "0.json")
        right.add((folder / "0.json").read_text())
    assert len(right) == 2
    tally = new_tally("a reader while outputs are replaced", "sql, status, verify", QUERIES)
    writer = crash.Child(folder, commands, again=True)
    seen = set()
    try:
        for number in range(QUERIES // 20):
            with tally.trial(20):
                crash.succeed(folder, "status" if number % 2 else "verify")
                crash.succeed_all(folder, [[*query, "--out", f"{n}.json"] for n in range(19)])
                seen |= {path.read_text() for path in folder.glob("*.json")}
                assert seen <= right
    finally:
        writer.kill()
        writer.wait()
    assert seen == right  # it was replaced meanwhile
