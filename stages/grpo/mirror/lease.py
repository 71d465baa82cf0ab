"""lease: who writes the mirror of a run: an object that its holder renews, each time on the condition that
nobody else has written it.
"""

from grpo.artifacts.lease import Clock, Holder, Lease, decoded
from grpo.mirror.store import Store, check_conditions

LEASE = "lease.json"


class _Object:
    """The note of a lease in a store, whose etag is its tag."""

    log = "mirror"
    stopped = "mirroring stopped, and what is committed here stays"

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._key = store, f"{folder}/{LEASE}"
        self.name = f"{store.address}/{self._key}"

    def read(self) -> tuple[bytes, str] | None:
        return self._store.get(self._key)

    def create(self, content: bytes) -> str | None:
        """As of a Note. Raises UsageError (exit 2) where the store ignores conditions."""
        etag = self._store.create(self._key, content)
        if etag is not None:
            check_conditions(self._store, self._key, content)
        return etag

    def replace(self, content: bytes, tag: str) -> str | None:
        return self._store.replace(self._key, content, tag)

    def release(self, content: bytes, tag: str) -> None:
        self._store.replace(self._key, content, tag)


def lease_of(store: Store, folder: str, epoch: str, clock: Clock) -> Lease:
    """The lease of a folder of a store, which is not taken yet."""
    return Lease(_Object(store, folder), epoch, clock)


def holder_of(store: Store, folder: str) -> Holder | None:
    """Who has the lease of a folder now, as far as its object says; None: nobody."""
    key = f"{folder}/{LEASE}"
    found = store.get(key)
    holder = None if found is None else decoded(f"{store.address}/{key}", found[0])
    return None if holder is None or holder.released else holder
