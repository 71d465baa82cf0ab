"""worker: one reward call inside a worker process, under a watchdog; it starts often, so it imports little.

What the user's code raises comes back as plain data: an exception that cannot be unpickled breaks the pool.
"""

import faulthandler
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from grpo.score.functions import call
from grpo.score.functions.call import GroupCall
from grpo.score.functions.workspace import OUTPUT
from grpo.score.outcome import Outcome

# faulthandler's lines, innermost first: `  File "/project/reward.py", line 12 in solve`
FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>[0-9]+) in (?P<name>.*)$', re.MULTILINE)


def start(import_root: str, folder: str) -> None:
    """Prepare a new worker: a process group of its own, the user's modules first on the path, and what it and
    its children print for the command to show."""
    os.setpgid(0, 0)
    # Pebble's handler is gone when Python ends, and a signal then is a traceback among what is shown.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Path(folder, f"{os.getpid()}.group").touch()
    sys.path.insert(0, import_root)
    # A pyc is matched by size and whole seconds: one written now would hide an edit made in the same second.
    sys.dont_write_bytecode = True
    output = os.open(Path(folder, OUTPUT), os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = sys.stderr


def score(
    note: str, function: str, arguments: dict[str, Any], timeout_s: float, group: GroupCall
) -> list[Outcome] | Outcome:
    """Outcomes of a group, or the one outcome of a call that failed as a whole.

    note: a file of this call: who began it when, and after timeout_s, when the process ends with status 1,
    where it was.
    """
    try:
        loaded = call.load(function)
        with Path(note).open("w") as traces:
            print(os.getpid(), time.monotonic(), file=traces, flush=True)
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=traces)
            try:
                return call.run(loaded, arguments, group)
            finally:
                faulthandler.cancel_dump_traceback_later()
    except BaseException as error:  # noqa: BLE001 - sys.exit() of a reward function too is only its own failure
        return Outcome(None, "error", call.describe(error))


def where_it_hung(traces: str) -> str:
    """ "solve, reward.py, line 12", of what the watchdog wrote."""
    main_thread = traces.rpartition("most recent call first")[2]  # the oldest thread is printed last
    frame = FRAME.search(main_thread)
    return f"{frame['name']}, {Path(frame['file']).name}, line {frame['line']}" if frame else "unknown place"
