"""lease: who writes the mirror of a run: an object that its holder renews, each time on the condition that
nobody else has written it.

Clocks of two machines are never compared: who waits sees by its own whether the object changes.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from grpo.errors import CorruptError, LockedError, ResourceError
from grpo.mirror.store import Store, check_conditions

LEASE = "lease.json"
RENEW_S = 10.0
STOP_S = 40.0
"""Without a renewal for so long the holder stops, well before another one may take over."""
LAPSE_S = 60.0
"""So long another one sees no change before it takes over."""
_LOOK_S = 2.0


@dataclass(frozen=True)
class Clock:
    """Seconds that pass, a suspended machine's too: others may have taken over meanwhile. And waiting."""

    now: Callable[[], float] = lambda: time.clock_gettime(
        getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    )
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Holder:
    """What the object says. session: of one command; beat: how often it was renewed."""

    host: str
    pid: int
    since: str
    session: str
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def encode(self) -> bytes:
        """As it is written."""
        return json.dumps(asdict(self)).encode()


def new_session() -> str:
    """A name that no other command has."""
    return secrets.token_hex(8)


class Lease:
    """The right to write below a folder of a store, from take() to release()."""

    def __init__(self, store: Store, folder: str, session: str, clock: Clock) -> None:
        self._store, self._key, self._clock = store, f"{folder}/{LEASE}", clock
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.held = Holder(socket.gethostname(), os.getpid(), now, session)
        self._etag, self._renewed = "", 0.0

    def take(
        self, known: Collection[str], say: Callable[[str], None], stop: Callable[[], None]
    ) -> str | None:
        """Take it; the session that had it last, or None: nobody had.

        known: sessions that are certainly over. say: told where another one's is waited for; stop: raises to
        end the waiting. Raises LockedError (exit 5) naming the holder, UsageError (exit 2) where the store
        ignores conditions.
        """
        asked = self._clock.now()
        etag = self._store.create(self._key, self.held.encode())
        if etag is not None:
            check_conditions(self._store, self._key, self.held.encode())
            self._etag, self._renewed = etag, asked
            return None
        last, etag = self._read()
        if not (last.released or last.session in known):
            etag = self._wait(last, etag, say, stop)
        asked = self._clock.now()
        won = self._store.replace(self._key, self.held.encode(), etag)
        if won is None:
            found, won = self._read()
            if found.session != self.held.session:  # else the answer to what was written was lost
                raise LockedError(f"{self._place}: in use by {found}; wait for it, or stop it")
        self._etag, self._renewed = won, asked
        return last.session

    def renew(self) -> None:
        """Say that the holder lives. Raises LockedError (exit 5) where another one has taken over."""
        asked, following = self._clock.now(), replace(self.held, beat=self.held.beat + 1)
        etag = self._store.replace(self._key, following.encode(), self._etag)
        if etag is None:
            found, etag = self._read()
            if found != following:  # else the answer was lost, and it was written
                raise self._lost(found)
        self.held, self._etag, self._renewed = following, etag, asked

    def check(self) -> None:
        """Before a marker is written. LockedError (exit 5) where another one has it, ResourceError (7)."""
        self.check_renewed()
        found, _ = self._read()
        if found.session != self.held.session:
            raise self._lost(found)

    def check_renewed(self, why: str = "") -> None:
        """Raise ResourceError (exit 7) where it was not renewed for so long that another may take it."""
        if self._clock.now() - self._renewed >= STOP_S:
            reason = f" ({why})" if why else ""
            raise ResourceError(f"{self._place}: not renewed for {STOP_S:.0f} s{reason}; mirroring stopped")

    def release(self) -> None:
        """Let the next one have it at once."""
        self._store.replace(self._key, replace(self.held, released=True).encode(), self._etag)

    def _wait(self, holder: Holder, etag: str, say: Callable[[str], None], stop: Callable[[], None]) -> str:
        """Look at another one's lease until it has lapsed; its etag. LockedError where it is renewed."""
        say(f"mirror: in use by {holder}; taken over if it is not renewed for {LAPSE_S:.0f} s")
        started = self._clock.now()
        while self._clock.now() - started < LAPSE_S:
            stop()
            self._clock.sleep(_LOOK_S)
            found, newer = self._read()
            if found.released:
                return newer
            if newer != etag:
                raise LockedError(f"{self._place}: in use by {found}; wait for it, or stop it")
        return etag

    def _read(self) -> tuple[Holder, str]:
        found = self._store.get(self._key)
        if found is None:
            raise CorruptError(f"{self._place}: gone while the mirror is in use; run the command again")
        return _decoded(self._place, found[0]), found[1]

    def _lost(self, found: Holder) -> LockedError:
        way = "mirroring stopped, and what is committed here stays"
        return LockedError(f"{self._place}: taken over by {found}; {way}")

    @property
    def _place(self) -> str:
        return f"{self._store.address}/{self._key}"


def holder_of(store: Store, folder: str) -> Holder | None:
    """Who has the lease of a folder now, as far as its object says; None: nobody."""
    key = f"{folder}/{LEASE}"
    found = store.get(key)
    holder = None if found is None else _decoded(f"{store.address}/{key}", found[0])
    return None if holder is None or holder.released else holder


def _decoded(place: str, content: bytes) -> Holder:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        raise CorruptError(f"{place}: not a lease; remove it if no command mirrors this run") from None
