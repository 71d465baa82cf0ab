"""A process of a group that hangs, fails alone or is killed: the others end, and say which and why."""

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.update import groups
from torch import distributed

from grpo.errors import EngineError, GrpoError, InputError
from grpo.update import parallel
from grpo.update.collective import collective
from grpo.update.parallel import Ranks

pytestmark = pytest.mark.xdist_group("parallel")
PATIENCE_S = 2.0
HERE = socket.gethostname()


class Computer:
    """What a learner is to a group."""

    made_with = ()

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @collective
    def hang(self) -> int:
        if self.ranks.rank == 1:
            time.sleep(PATIENCE_S + 2)
        return self.ranks.most(1)

    @collective
    def fail_alone(self) -> int:
        if self.ranks.rank == 1:
            raise InputError("the checkpoint is not on this machine; copy it")
        return self.ranks.most(1)

    @collective
    def die(self) -> int:
        if self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.ranks.most(1)


def as_process(rank: int, folder: Path, scene: str) -> None:
    """How this process ends, and after how many seconds, to a file."""
    parallel._LAST_WORDS_S = 1.0
    patience = timedelta(seconds=PATIENCE_S if scene == "hang" else 60)
    ranks = Ranks(groups.store(folder, scene), rank, groups.WORLD, patience=patience)
    started, computer = time.monotonic(), Computer(ranks)
    try:
        getattr(computer, scene)() if rank == 0 else ranks.follow()
    except GrpoError as error:
        found = str(error), error.exit_code, time.monotonic() - started
        (folder / f"{scene}-{rank}").write_text("\n".join(map(str, found)))
        with pytest.raises(EngineError, match="cannot be reached any more"):
            computer.hang()  # not one more call may be waited for
        ranks.end(error.exit_code, str(error))
        ranks.leave()
        sys.exit(error.exit_code)


def leave_alone(rank: int, folder: Path) -> None:
    """Rank 0 leaves when rank 1 has ended."""
    ranks = Ranks(groups.store(folder, "leave"), rank, groups.WORLD, patience=timedelta(seconds=60))
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        ranks.leave()
    assert not distributed.is_initialized()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lost")
    codes = groups.start(as_process, folder, ("fail_alone", "hang", "die"))
    assert codes == [4, 4, 8, 8, 8, -signal.SIGKILL]

    return {path.name: path.read_text().split("\n") for path in folder.glob("*-?")}


def test_a_process_that_fails_alone_ends_and_so_do_the_others_with_its_line(ends: Any) -> None:
    for rank in range(groups.WORLD):
        line, code, seconds = ends[f"fail_alone-{rank}"]
        assert (line, code) == ("the checkpoint is not on this machine; copy it", "4")
        assert float(seconds) < 20


def test_a_process_that_hangs_is_named_when_patience_ends(ends: Any) -> None:
    line, code, seconds = ends["hang-0"]
    gone = f"update: rank 1 on {HERE} did not answer within 2 s"
    assert (line, code) == (f"{gone}, and the others cannot go on; nothing was committed", "8")
    assert PATIENCE_S <= float(seconds) < 20
    assert ends["hang-1"][:2] == [line, code]  # it wakes up, finds itself alone, and says the same


def test_a_process_that_is_killed_is_named_at_once(ends: Any) -> None:
    line, code, seconds = ends["die-0"]
    assert (line, code) == (
        f"update: rank 1 on {HERE} ended, and the others cannot go on; nothing was committed",
        "8",
    )
    assert float(seconds) < 10
    assert "die-1" not in ends


def test_who_cannot_leave_together_is_in_no_group_either(tmp_path: Path) -> None:
    assert groups.start(leave_alone, tmp_path) == [0, 0]
