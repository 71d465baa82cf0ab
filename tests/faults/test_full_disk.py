"""A disk that is really full: a small file system in memory. Needs Linux and the right to mount."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash

from grpo.pipeline import stages

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """mounted(KiB): an empty file system of that size; the one before goes."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(kib: int) -> Path:
        subprocess.run(["umount", place], capture_output=True, check=False)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place], check=True)
        return place

    yield mount
    subprocess.run(["umount", place], check=False)


@pytest.mark.parametrize("checked", [True, False], ids=["refused before the work", "in the middle of it"])
def test_a_full_disk_is_exit_7_and_with_room_the_same_command_completes_it(
    checked: bool,
    mounted: Callable[[int], Path],
    write_project: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_tally: NewTally,
) -> None:
    start = write_project(tmp_path / "start")
    whole = crash.copy(start, mounted(65536) / "project")
    least = shutil.disk_usage(whole).used
    crash.succeed(whole, "run")
    most = shutil.disk_usage(whole).used
    expected = crash.contents(whole)
    if not checked:
        monkeypatch.setattr(stages, "require_space", lambda *_: None)
    sizes = range(least // 1024 + 8, most // 1024 - 8, 16)
    tally = new_tally("a full disk (tmpfs)", "run, " + ("checked before" if checked else "not checked"))
    before = 0
    for kib in sizes:
        with tally.trial():
            place = mounted(kib)
            folder = crash.copy(start, place / "project")
            code, err = crash.in_child(folder, ["run"])
            assert code == 7, (kib, code, err)
            [line] = [line for line in err.splitlines() if line.startswith("error: ")]
            before += "are free on its disk" in line
            assert "free on its disk" in line
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            crash.succeed(folder, "run")
            assert crash.contents(folder) == expected
            crash.succeed(folder, "verify")
    assert (before > len(sizes) // 2) == checked
