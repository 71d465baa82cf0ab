"""workspace: the temporary folder of reward workers: what they print, where they hang, which groups they are.

It is locked while its command lives. One that is not locked is of a command that was killed: the next command
removes it. The files are `output` (a FIFO), `lock`, `<pid>.group` of a worker, and one of each call.
"""

import codecs
import fcntl
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from grpo.console import printable
from grpo.score.functions import guard

PREFIX = "grpo-rewards-"
OUTPUT, LOCK, MODULES = "output", "lock", "modules"
MAX_OUTPUT = 2**16  # characters shown of what functions print, until reset_output_limit()
MAX_LINE = 2000
POLL_S = 0.1
DRAIN_S = 1.0  # what was printed before the end is shown, unless it never ends


def print_line(line: str) -> None:
    """Show on stderr a line that a reward function printed."""
    with suppress(OSError, ValueError):  # stderr is full or closed, which is no fault of a reward
        print(line, file=sys.stderr, flush=True)


class Workspace:
    """The folder, and a thread that shows what the workers print, a line at a time."""

    def __init__(self, show: Callable[[str], object] = print_line, guarded: bool = False) -> None:
        """guarded: this process is a worker itself, and may be killed: what its workers are ends then too."""
        _sweep()
        self._show_line = show
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        new = self.folder / f"{LOCK}.new"
        self._lock = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.folder / LOCK)  # by this name it was never free
        os.mkfifo(self.folder / OUTPUT)
        self._pipe = os.open(self.folder / OUTPUT, os.O_RDWR | os.O_NONBLOCK)  # RDWR: it never ends by itself
        self._guard = _guard(self.folder) if guarded else None
        self._left = MAX_OUTPUT
        self._closing, self._showing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._show, name="reward output", daemon=True)
        self._thread.start()

    def reset_output_limit(self) -> None:
        """Show as much again of what is printed."""
        self._left = MAX_OUTPUT

    def drain(self) -> None:
        """Wait until what has been printed is shown, but for a line that has no end yet."""
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            with self._showing:
                if not select.select([self._pipe], [], [], 0)[0]:
                    return
            time.sleep(DRAIN_S / 100)

    def put(self, files: Mapping[str, bytes]) -> Path:
        """Write files, in place of those of before; where they are."""
        root = self.folder / MODULES
        shutil.rmtree(root, ignore_errors=True)
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    def started(self, call: str) -> tuple[int, float] | None:
        """The worker's pid and time.monotonic() when it began a call, or None where it has not."""
        with suppress(OSError, ValueError):
            pid, began = (self.folder / call).read_text(errors="replace").partition("\n")[0].split()
            return int(pid), float(began)
        return None

    def trace(self, call: str) -> str:
        """What the watchdog wrote when it ended a call; "" where it did not."""
        path = self.folder / call
        return path.read_text(errors="replace").partition("\n")[2] if path.exists() else ""

    def forget(self, call: str) -> None:
        """Remove the note on a call."""
        (self.folder / call).unlink(missing_ok=True)

    def end_groups(self) -> None:
        """End what dead workers have started: a process group lives on while anything in it does."""
        for path in self.folder.glob("*.group"):
            pid = int(path.stem)
            if not is_alive(pid):
                with suppress(ProcessLookupError, PermissionError):  # macOS says so of a group of zombies
                    os.killpg(pid, signal.SIGKILL)
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """End what the workers, which have ended, have started; remove the folder."""
        self.end_groups()
        self._closing.set()
        self._thread.join()
        os.close(self._pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._guard is not None:
            self._guard.close()
        os.close(self._lock)

    def _show(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        line, end = "", float("inf")
        while time.monotonic() < end:
            ready, _, _ = select.select([self._pipe], [], [], POLL_S)
            if self._closing.is_set():
                end = min(end, time.monotonic() + (DRAIN_S if ready else 0))
            if ready:
                with self._showing:
                    *lines, line = (line + decode(os.read(self._pipe, 2**16))).split("\n")
                    for each in lines:
                        self._say(each)
                line = line[:MAX_LINE]
        self._say(line)

    def _say(self, line: str) -> None:
        if self._left <= 0 or not line:
            return
        self._left -= len(line) + 1
        shown = printable(line[:MAX_LINE].rstrip("\r"))
        if self._left <= 0:
            shown = f"a reward function prints more than {MAX_OUTPUT} characters; the rest is not shown"
        self._show_line(shown)


def is_alive(pid: int) -> bool:
    """Whether a child process has not been waited for yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _guard(folder: Path) -> IO[bytes]:
    """Start a guard of the folder; what it returns is open as long as this process is there."""
    command = [sys.executable, "-I", "-S", str(Path(guard.__file__)), str(folder)]
    null = subprocess.DEVNULL
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd="/", start_new_session=True
    )
    started.wait()  # what guards is a child of it
    assert started.stdin is not None
    return started.stdin


def _sweep() -> None:
    """Remove what commands that were killed have left."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_free(Path(entry.path))


def _remove_if_free(folder: Path) -> None:
    found = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if folder.lstat().st_uid == os.getuid() and stat.S_ISREG(os.fstat(found).st_mode):
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(found)
