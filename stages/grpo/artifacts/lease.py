"""artifacts.lease: who writes to a place, where no kernel can tell: a note that its holder renews.

Clocks of two machines are never compared: who waits sees by its own whether the note changes. The folder of a
run has one beside its lock (lock.py), and so has a run's mirror (mirror/lease.py).
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Protocol

from grpo.errors import CorruptError, GrpoError, LockedError, ResourceError

RENEW_S = 10.0
STOP_S = 40.0
"""Without a renewal for so long the holder writes nothing more, well before another one may take over."""
LAPSE_S = 60.0
"""So long another one sees no change before it takes over."""
_LOOK_S = 2.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Clock:
    """Seconds that pass, a suspended machine's too: others may have taken over meanwhile. And waiting."""

    now: Callable[[], float] = lambda: time.clock_gettime(
        getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    )
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()


@dataclass(frozen=True)
class Holder:
    """What the note says. epoch: of one command, no other has it; beat: how often it was renewed.

    kernel: the one that runs it, by a name that a restart changes.
    """

    host: str
    pid: int
    since: str
    epoch: str
    kernel: str = ""
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def encode(self) -> bytes:
        """As it is written."""
        return json.dumps(asdict(self)).encode()


def decoded(place: str, content: bytes) -> Holder:
    """What a note says. Raises CorruptError (exit 6) for what is none."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        raise CorruptError(f"{place}: not a lease; remove it if no command is at work there") from None


def new_epoch() -> str:
    """A name that no other command has."""
    return secrets.token_hex(8)


@cache
def this_kernel() -> str:
    """A name of the kernel that runs this process; where it has none, the machine's."""
    return _BOOT.read_text().strip() if _BOOT.exists() else socket.gethostname()


class Note(Protocol):
    """Where a lease is written; a tag names a version of it. name: for messages; log: who says so."""

    name: str
    log: str
    stopped: str

    def read(self) -> tuple[bytes, str] | None:
        """What it says, and its tag; None: it is not there."""

    def create(self, content: bytes) -> str | None:
        """Write it where it is not there; its tag. None: it is."""

    def replace(self, content: bytes, tag: str) -> str | None:
        """Write it in the place of a version; its tag. None: that is not there."""

    def release(self, content: bytes, tag: str) -> None:
        """The same, or remove that version: nobody holds it any more."""


class Lease:
    """The right to write to a place, from take() to release()."""

    def __init__(self, note: Note, epoch: str, clock: Clock) -> None:
        self._note, self._clock = note, clock
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.held = Holder(socket.gethostname(), os.getpid(), now, epoch, this_kernel())
        self._tag, self._renewed = "", 0.0
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(
        self, is_over: Callable[[Holder], bool], say: Callable[[str], None], stop: Callable[[], None]
    ) -> str | None:
        """Take it; the epoch that had it last, or None: nobody had.

        is_over: whether a holder has certainly ended. say: told where another one is waited for; stop: raises
        to end the waiting. Raises LockedError (exit 5) naming the holder.
        """
        last: Holder | None = None
        waited = False
        while True:
            asked = self._clock.now()
            tag = self._note.create(self.held.encode())
            if tag is None and (found := self._read()) is not None:
                last, tag = found
                if not (last.released or is_over(last)):
                    tag, waited = self._wait(last, tag, say, stop), True
                asked = self._clock.now()
                tag = None if tag is None else self._written(self.held, tag, self._in_use)
            if tag is not None:
                break
        self._tag, self._renewed = tag, asked
        if waited:  # where a folder is shared, another one may have written at the same moment, or woken up
            self._clock.sleep(_LOOK_S)
            self.check()
        return None if last is None else last.epoch

    def keep(self, failed: Callable[[GrpoError], None] = lambda error: None) -> None:
        """Renew it from now on, in a thread; told where that has failed for STOP_S, or it is lost."""
        # A daemon: a second signal ends the command without waiting for what is under way.
        self._thread = threading.Thread(target=self._keep, args=(failed,), name="lease", daemon=True)
        self._thread.start()

    def _keep(self, failed: Callable[[GrpoError], None]) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.renew()
            except ResourceError as error:  # it is tried again: the holder may have no need of it meanwhile
                try:
                    self.check_renewed(str(error))
                except ResourceError as overdue:
                    failed(overdue)
            except GrpoError as error:
                failed(error)
                return

    def renew(self) -> None:
        """Say that the holder lives. Raises LockedError (exit 5) where another one has taken over."""
        with self._renewing:
            asked, following = self._clock.now(), replace(self.held, beat=self.held.beat + 1)
            tag = self._written(following, self._tag, self._lost)
            self.held, self._tag, self._renewed = following, tag, asked

    def check(self) -> None:
        """Before something is committed. Raises LockedError (exit 5) where another one has taken over.

        A holder that was suspended for longer than STOP_S, and whose lease nobody has taken, renews it first.
        """
        if self._clock.now() - self._renewed >= STOP_S:
            self.renew()
        found = self._read()
        if found is None or found[0].epoch != self.held.epoch:
            raise self._lost(found and found[0])

    def check_renewed(self, why: str = "") -> None:
        """Raise ResourceError (exit 7) where it was not renewed for so long that another may take it."""
        if self._clock.now() - self._renewed >= STOP_S:
            reason = f" ({why})" if why else ""
            raise ResourceError(
                f"{self._note.name}: not renewed for {STOP_S:.0f} s{reason}; {self._note.stopped}"
            )

    def end(self) -> None:
        """Renew it no more."""
        self._ended.set()

    def release(self, epoch: str | None = None) -> None:
        """Let the next one have it at once. epoch: that had it last, where this one has written nothing."""
        self.end()
        if self._thread is not None:
            self._thread.join()
        left = replace(self.held, epoch=epoch or self.held.epoch, released=True)
        self._note.release(left.encode(), self._tag)

    def _wait(
        self, holder: Holder, tag: str, say: Callable[[str], None], stop: Callable[[], None]
    ) -> str | None:
        """Look at another one's lease until it has lapsed; its tag. LockedError where it is renewed.

        None: it is there no more.
        """
        say(f"{self._note.log}: in use by {holder}; taken over if it is not renewed for {LAPSE_S:.0f} s")
        started = self._clock.now()
        while self._clock.now() - started < LAPSE_S:
            stop()
            self._clock.sleep(_LOOK_S)
            found = self._read()
            if found is None:
                return None
            if found[0].released:
                return found[1]
            if found[1] != tag:
                raise self._in_use(found[0])
        return tag

    def _written(self, holder: Holder, tag: str, refusal: Callable[[Holder | None], GrpoError]) -> str:
        """Write it in the place of the version `tag`; its tag. Raises the refusal where another one has."""
        written = self._note.replace(holder.encode(), tag)
        if written is not None:
            return written
        found = self._read()
        if found is None or found[0] != holder:  # else the answer to what was written was lost
            raise refusal(found and found[0])
        return found[1]

    def _read(self) -> tuple[Holder, str] | None:
        found = self._note.read()
        return None if found is None else (decoded(self._note.name, found[0]), found[1])

    def _in_use(self, found: Holder | None) -> LockedError:
        who = "another command" if found is None else str(found)
        return LockedError(f"{self._note.name}: in use by {who}; wait for it, or stop it")

    def _lost(self, found: Holder | None) -> LockedError:
        who = "another command, which has ended" if found is None else str(found)
        return LockedError(f"{self._note.name}: taken over by {who}; {self._note.stopped}")
