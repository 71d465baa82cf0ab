"""worker: one reward call inside a worker process, under a watchdog; it starts often, so it imports little.

What the user's code raises comes back as plain data: an exception that cannot be unpickled breaks the pool.
"""

import faulthandler
import os
import re
import sys
from pathlib import Path
from typing import Any

from grpo.score.functions import call
from grpo.score.functions.call import GroupCall
from grpo.score.outcome import Outcome

# faulthandler's lines, innermost first: `  File "/project/reward.py", line 12 in solve`
FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>[0-9]+) in (?P<name>.*)$', re.MULTILINE)


def start(import_root: str) -> None:
    """Prepare a new worker: the user's modules first on the path, and nothing of theirs on our stdout."""
    sys.path.insert(0, import_root)
    # A pyc is matched by size and whole seconds: one written now would hide an edit made in the same second.
    sys.dont_write_bytecode = True
    os.dup2(2, 1)
    sys.stdout = sys.stderr


def score(
    folder: str, function: str, arguments: dict[str, Any], timeout_s: float, group: GroupCall
) -> list[Outcome] | Outcome:
    """Outcomes of a group, or the one outcome of a call that failed as a whole.

    After timeout_s the process writes where it was to `folder/<pid>` and ends with status 1.
    """
    try:
        loaded = call.load(function)
        with Path(folder, str(os.getpid())).open("w") as traces:
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=traces)
            try:
                return call.run(loaded, arguments, group)
            finally:
                faulthandler.cancel_dump_traceback_later()
    except BaseException as error:  # noqa: BLE001 - sys.exit() of a reward function too is only its own failure
        return Outcome(None, "error", call.describe(error))


def where_it_hung(folder: str, pid: int) -> str | None:
    """ "solve, reward.py, line 12" when the watchdog ended worker `pid`, else None. Forgets it."""
    path = Path(folder, str(pid))
    traces = path.read_text(errors="replace") if path.exists() else ""
    path.unlink(missing_ok=True)
    if not traces:
        return None
    main_thread = traces.rpartition("most recent call first")[2]  # the oldest thread is printed last
    frame = FRAME.search(main_thread)
    return f"{frame['name']}, {Path(frame['file']).name}, line {frame['line']}" if frame else "unknown place"
