"""One thread that writes beside other work, and whether there is room for what it writes."""

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.artifacts import redo

from grpo.artifacts import CHECKPOINT, Writer, require_space
from grpo.errors import ResourceError


def full() -> None:
    raise ResourceError("no room")


def test_a_task_runs_beside_the_work_and_wait_returns_when_it_has_ended() -> None:
    writer, go, done = Writer(), threading.Event(), []
    writer.start(lambda: done.append(go.wait(10)))
    assert done == []  # start() did not wait for it
    go.set()
    writer.wait()
    assert done == [True]
    writer.wait()  # nothing is being written
    writer.close()


def test_there_is_one_at_a_time_in_order() -> None:
    writer, done = Writer(), []
    for number in range(20):
        writer.start(lambda number=number: done.append(number))  # type: ignore[misc]
        assert len(done) >= number  # those before have ended
    writer.close()  # waits too
    assert done == [*range(20)]


@pytest.mark.parametrize("at", ["wait", "start"])
def test_what_failed_is_raised_at_the_next_border_and_once(at: str) -> None:
    writer, done = Writer(), []
    writer.start(full)
    with pytest.raises(ResourceError, match="no room"):
        writer.wait() if at == "wait" else writer.start(lambda: done.append("never"))
    writer.wait()
    assert done == []
    writer.start(lambda: done.append("next"))  # it goes on to write
    writer.wait()
    assert done == ["next"]
    writer.close()


def test_close_raises_nothing() -> None:
    writer = Writer()
    writer.start(full)
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.mark.parametrize(("free", "is_enough"), [(13_500_000_000, True), (12_400_000_000, False)])
def test_the_room_that_a_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, is_enough: bool
) -> None:
    """10 GB, and a quarter more: 12.5 GB, and 1 MiB. Whatever the checkpoint before took."""
    run = redo.trained(tmp_path, 2, [1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if is_enough:
        require_space(run, CHECKPOINT, 1, 10**10)
        return
    with pytest.raises(ResourceError) as caught:
        require_space(run, CHECKPOINT, 1, 10**10)
    assert caught.value.exit_code == 7
    # 12.5e9 / 2^20 + 1 = 11,922; 12.4e9 / 2^20 = 11,826
    assert str(caught.value) == (
        f"{run.folder(CHECKPOINT, 1)}: needs about 11,922 MiB, 11,826 MiB are free on its disk; free some"
        " (`grpo gc`), or keep fewer checkpoints (checkpoints.keep_last)"
    )
