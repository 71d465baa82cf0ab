"""artifacts.faults: what tests let happen at the n-th operation of the file layer.

GRPO_FAULT=kill:17 ends the process by SIGKILL in place of operation 17, GRPO_FAULT=ENOSPC:17 (or another name
of errno) lets it fail so, and GRPO_FAULT=record:FILE appends each operation to FILE, a JSON array a line:
kind, path, other path or null, and the function and line that asked for it. What is synced in line n is kept
as FILE.n.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from grpo.errors import UsageError

VARIABLE = "GRPO_FAULT"
_numbers = itertools.count(1)  # of this process's operations while a fault is planned
_recording = threading.Lock()  # two threads write, and line n belongs to FILE.n


def operation(kind: str, path: Path, other: Path | None = None) -> None:
    """Every change that artifacts.files is about to make on disk passes here first."""
    planned = os.environ.get(VARIABLE)
    if planned is None:
        return
    fault, _, at = planned.partition(":")
    if fault == "record":
        place = _caller()
        with _recording, Path(at).open("a") as log:
            log.write(json.dumps([kind, str(path), other and str(other), place]) + "\n")
            number = next(_numbers)
        if kind == "fsync":
            shutil.copyfile(path, f"{at}.{number}")
    elif not at.isdecimal() or (fault != "kill" and fault not in errno.errorcode.values()):
        raise UsageError(f"{VARIABLE}={planned}: expected kill:N, a name of errno and :N, or record:FILE")
    elif next(_numbers) == int(at):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number), str(path))


def _caller() -> str:
    """Function and line, outside the file layer, that asked for the operation."""
    frame = sys._getframe(2)
    inside = frame.f_code.co_filename
    while frame.f_back is not None and frame.f_code.co_filename in (inside, contextlib.__file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}"
