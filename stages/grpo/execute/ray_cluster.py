"""ray_cluster: a Ray cluster that this process enters, looks at, and finds gone.

Only this file and ray_actors.py import ray.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask, and tell
import ray

from grpo.errors import ResourceError, UsageError, first_line

REACH_S = 10  # of the cluster's head
HEAD_S = 30  # that the cluster's head may not answer
LOOK_S = 5  # between two looks at it
# Ray would end this process a minute after it lost the head, without a word of ours.
_RAYS_PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(7 * 24 * 3600)}


class Node(NamedTuple):
    """What a node of a cluster has."""

    cpus: int
    gpus: int

    def room_for(self, cpus: int, gpus: int) -> int:
        """How many workers that take so much."""
        return min(self.cpus // cpus, self.gpus // gpus if gpus else self.cpus // cpus)


def nodes_of(address: str) -> list[Node]:
    """Of the cluster at `address`, as they are now. Raises ResourceError (exit 7) where none is there."""
    entered = not ray.is_initialized()
    if entered:
        enter(address)
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]
    finally:
        if entered:
            ray.shutdown()


class Head:
    """Of the cluster, host:port: without it no actor starts, and Ray would wait for it without an end."""

    def __init__(self, address: str) -> None:
        self._address, self._looked = address, time.monotonic()
        self._silent_since: float | None = None
        self.is_gone = False

    def look(self) -> None:
        """Raise ResourceError (exit 7) once it has not answered for HEAD_S."""
        if (now := time.monotonic()) - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            _connect(self._address)
            self._silent_since = None
        except OSError as error:
            self._silent_since = self._silent_since or now
            self.is_gone = now - self._silent_since > HEAD_S
            if self.is_gone:
                raise ResourceError(
                    f"execution.address: the cluster's head, {self._address}, has not answered for {HEAD_S}"
                    f" s: {first_line(error)}; what is committed is kept; start another one, and the same"
                    " command resumes"
                ) from error


def enter(address: str) -> None:
    """Become a driver of the cluster."""
    # It would print what befalls workers to stdout, which is for results; the pool says what matters.
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        options["include_dashboard"] = False
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is Ray's: workers would wait for all else
    with _own_handlers():
        try:
            if address == "local":
                ray.init(address=address, **options)
            else:
                _reach(address)
                with _environment(_RAYS_PATIENCE):
                    ray.init(address=address, **options)
        except ValueError as error:
            raise UsageError(f"execution.address: {address}: {first_line(error)}") from error
        except (OSError, RuntimeError) as error:
            way = "`ray start --head` begins one, execution.address: local has one of its own"
            raise ResourceError(f"execution.address: {address}: {first_line(error)}; {way}") from error


def _reach(address: str) -> None:
    """Raise OSError where nobody is there: Ray would try for minutes, and reach no other one afterwards."""
    # Private, as is what enter() replaces: there is no other way. So one release of Ray is allowed.
    from ray._private.services import canonicalize_bootstrap_address

    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise ConnectionError("this machine is in no Ray cluster")
    _connect(found)


def _connect(address: str) -> None:
    """Raise OSError where nobody is there."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ValueError("host:port is right")
    with socket.create_connection((host, int(port)), timeout=REACH_S):
        pass


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """With these variables, which are not there otherwise: what this process starts has its own patience."""
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            del os.environ[name]


@contextmanager
def _own_handlers() -> Iterator[None]:
    """What Ray sets for SIGTERM would end the driver without a word: ours come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
