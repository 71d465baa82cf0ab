"""roll_call: which process of a group is gone, and why: asked once its connections have failed.

By a store beside them: what a process said before it ended, else who does not answer.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from grpo.console import duration
from grpo.errors import EngineError, GrpoError, Interrupted

_WAIT_S, _PAUSE_S = 5.0, 0.1
Place = tuple[str, int]
"""Host and process id."""


def place() -> Place:
    """Where this process is."""
    return socket.gethostname(), os.getpid()


class RollCall:
    """Of a group; `places` by rank. Calls are counted, alike in all processes: what is said is of one.

    patience: how long they waited for each other.
    """

    def __init__(self, store: Any, rank: int, patience: timedelta, places: Sequence[Place]) -> None:
        self._store, self._rank, self._places = store, rank, places
        self._patience = patience

    def say(self, call: int, line: str, exit_code: int) -> None:
        """Why this process fails in a call."""
        self._store.set(f"why/{call}/{self._rank}", json.dumps([line, exit_code]))

    def say_last(self, line: str, exit_code: int) -> None:
        """The same of this process as it ends, in a call or between two."""
        self._store.set(f"last/{self._rank}", json.dumps([line, exit_code]))

    def said(self, call: int, rank: int) -> GrpoError | None:
        """What another one said."""
        for key in (f"why/{call}/{rank}", f"last/{rank}"):
            if self._store.check([key]):
                line, exit_code = json.loads(self._store.get(key))
                kinds = {kind.exit_code: kind for kind in GrpoError.__subclasses__()}
                kinds.pop(Interrupted.exit_code)  # made of a signal's number
                error = kinds.get(exit_code, EngineError)(line)
                error.exit_code = exit_code
                return error
        return None

    def account(self, call: int) -> GrpoError:
        """What to end with: as another one did, or EngineError (exit 8) naming who is gone or late."""
        try:
            return self._asked(call)
        except RuntimeError:  # the store may be rank 0's
            return self._error([0], "ended")

    def _asked(self, call: int) -> GrpoError:
        self._store.set(f"here/{self._rank}", "")
        others = [rank for rank in range(len(self._places)) if rank != self._rank]
        missing, gone, until = others, list[int](), time.monotonic() + _WAIT_S
        late: list[int] | None = None
        while missing and not gone and time.monotonic() < until:
            time.sleep(_PAUSE_S)
            for rank in others:
                if (reason := self.said(call, rank)) is not None:
                    return reason
            missing = [rank for rank in others if not self._store.check([f"here/{rank}"])]
            late = missing if late is None else late
            gone = [rank for rank in missing if self._is_gone(rank)]
        how = "ended" if gone else f"did not answer within {duration(self._patience.total_seconds())}"
        return self._error(gone or missing or late or [], how)

    def _error(self, ranks: Sequence[int], how: str) -> EngineError:
        named = ", ".join(f"rank {rank} on {self._places[rank][0]}" for rank in ranks)
        return EngineError(
            f"update: {named or 'a connection'} {how}, and the others cannot go on; nothing was committed"
        )

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this machine is there no more; of another machine nobody can tell."""
        host, pid = self._places[rank]
        if host != socket.gethostname():
            return False
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except FileNotFoundError:  # no Linux
            return False
        return state == "Z"  # nobody has asked yet how it ended
