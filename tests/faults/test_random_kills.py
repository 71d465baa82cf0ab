"""SIGKILL at random times, again and again; and what a long run holds on to."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import extent

pytestmark = [pytest.mark.slow, pytest.mark.sampled]
KILLS = extent("SIGKILL at a random time")
RUN = ["run", "--until", "6", "--set", "checkpoints={every: 3, keep_last: null}"]
LONG_RUN = [
    "run",
    "--until",
    str(extent("iterations of a long run")),
    "--set",
    "checkpoints={every: 1, keep_last: 3}",
]


def test_killed_again_and_again_a_run_ends_with_the_same_bytes(
    write_project: Callable[[Path], Path], tmp_path: Path, new_tally: NewTally
) -> None:
    """Runs of six iterations, one after the other, until all kills were made."""
    start = write_project(tmp_path / "start")
    whole = crash.copy(start, tmp_path / "whole")
    crash.succeed(whole, *RUN)
    expected = crash.contents(whole)
    tally = new_tally("SIGKILL at a random time", "run", KILLS)
    chance, kills = random.Random(0), 0
    while kills < KILLS:
        folder = crash.copy(start, tmp_path / "killed")
        committed: dict[str, int] = {}
        code = -signal.SIGKILL
        while code != 0 and kills < KILLS:
            child = crash.Child(folder, [RUN])
            time.sleep(chance.uniform(0.0, 0.8))
            child.kill()
            code, _, err = child.wait()
            with tally.trial(int(code != 0)):
                assert code in (0, -signal.SIGKILL), err
            kills += code != 0
            committed |= crash.finished_shards(folder)
        crash.succeed(folder, *RUN)
        crash.succeed(folder, "verify")
        assert crash.contents(folder) == expected
        assert crash.leftovers(folder) == []
        found = crash.finished_shards(folder)
        assert [name for name in committed if found.get(name) != committed[name]] == []  # none made again


def test_a_long_run_holds_on_to_nothing(
    write_project: Callable[[Path], Path], tmp_path: Path, new_tally: NewTally
) -> None:
    """Memory and open files of a long run, and the bytes of the same run with random kills."""
    start = write_project(tmp_path / "start")
    whole, killed = (crash.copy(start, tmp_path / name) for name in ("whole", "killed"))
    iterations = int(LONG_RUN[2])
    tally = new_tally("a long run, with random kills", f"{iterations} iterations")
    child = crash.Child(whole, [LONG_RUN])
    seen: dict[int, tuple[float, int]] = {}  # iterations begun -> MiB, open files
    while (now := crash.usage(child)) is not None:
        seen[len(list((whole / crash.RUN).glob("iteration=*")))] = now
        time.sleep(0.05)
    code, _, err = child.wait()
    assert code == 0, err
    (early_mib, early_files), (late_mib, late_files) = seen[iterations // 4], seen[max(seen)]
    print(f"iteration {iterations // 4}: {early_mib:.0f} MiB of memory, {early_files} open files")
    print(f"iteration {max(seen)}: {late_mib:.0f} MiB of memory, {late_files} open files")
    assert late_files <= early_files + 2
    assert late_mib < early_mib + 40
    chance, code, patience = random.Random(1), -signal.SIGKILL, 1.0
    while code != 0:
        before = len(list((killed / crash.RUN).glob("iteration=*")))
        child = crash.Child(killed, [LONG_RUN])
        time.sleep(chance.uniform(0.2, 2.0) * patience)
        child.kill()
        code, _, err = child.wait()
        with tally.trial(int(code != 0)):
            assert code in (0, -signal.SIGKILL), err
        # On a busy machine two seconds may not be enough for anything.
        came_on = len(list((killed / crash.RUN).glob("iteration=*"))) > before
        patience = 1.0 if came_on else 1.5 * patience
    sizes = [crash.size(folder / "artifacts") / 2**20 for folder in (whole, killed)]
    print(f"on disk: {sizes[0]:.1f} MiB undisturbed, {sizes[1]:.1f} MiB killed")
    assert crash.contents(killed) == crash.contents(whole)
    crash.succeed(killed, "verify")
    crash.succeed(killed, "gc")
    assert abs(crash.size(killed / "artifacts") - crash.size(whole / "artifacts")) < 2**20
