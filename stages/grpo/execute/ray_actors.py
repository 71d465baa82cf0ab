"""ray_actors: workers as Ray actors, on any node of a cluster.

An actor is never restarted by Ray: it would come back without its weights. The pool asks for a new one.
"""

import re
import time
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, ClassVar
from weakref import WeakSet

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.errors import UsageError
from grpo.execute.answering import Answering, Open
from grpo.execute.node import check_same, facts
from grpo.execute.protocol import NoPlace, Worker, WorkerDied
from grpo.execute.ray_cluster import Head, Node, enter

WAIT_S = 30  # until one that is idle takes the job of an actor without a place
START_S = 300  # until an actor has a place and a process, of which libraries are imported


class RayActors:
    """Actors of a cluster, all alike. open_worker: of each. cpus, gpus: what each takes of its node.

    address: of the cluster's head, `auto` for the one that this machine is in, `local` for one of its own.
    together: so many are started, and all of them have a place, near each other, or none has.
    Raises ResourceError (exit 7) where no cluster is there.
    """

    _open: ClassVar[WeakSet["RayActors"]] = WeakSet()  # the last to close leaves the cluster

    def __init__(self, open_worker: Open, address: str, cpus: int, gpus: int, together: int = 0) -> None:
        self._takes = {"num_cpus": cpus, "num_gpus": gpus}
        is_outside = not ray.is_initialized()
        # Else whoever runs us is in a cluster already.
        self._entered: bool = is_outside or any(other._entered for other in self._open)
        self._is_own = self._entered and address == "local"
        if is_outside:
            enter(address)
        self._open.add(self)
        self._opener = ray.put(open_worker)
        self._head = Head(ray.get_runtime_context().gcs_address)
        bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        self._group = placement_group([bundle] * together, strategy="PACK") if together else None
        self._started = 0

    @property
    def host(self) -> str:
        """Of this node."""
        return str(get_node_ip_address())

    def start(self) -> "Actor":
        """A new one; unless they are together, Ray spreads them over the nodes."""
        place: Any = "SPREAD"
        if self._group is not None:
            place = PlacementGroupSchedulingStrategy(self._group, self._started)
        self._started += 1
        return Actor(self._opener, self._takes, place, self._head)

    def wait(self, busy: Collection[Worker], timeout_s: float) -> list[Worker]:
        """Those of `busy` that have answered or died, or got no place in START_S.

        Raises ResourceError (exit 7) where the cluster's head does not answer: nothing new starts without it.
        """
        self._head.look()
        of_answer = {each.answer: each for each in busy if isinstance(each, Actor)}
        answered, _ = ray.wait(list(of_answer), num_returns=1, timeout=timeout_s)
        late: list[Worker] = [each for each in of_answer.values() if each.is_without_place()]
        return late or [of_answer[answer] for answer in answered]

    def room(self, most: int) -> int:
        """How many of `most` more have a place now."""
        cpus, gpus = self._takes["num_cpus"], self._takes["num_gpus"]
        # Private: what Ray has of it in public is of all nodes together, where a worker is on one.
        free = ray._private.state.available_resources_per_node().values()
        nodes = [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in free]
        return min(most, sum(node.room_for(cpus, gpus) for node in nodes))

    def is_one_machine(self) -> bool:
        """Whether the cluster is one of our own: nodes join any other at any time."""
        return self._is_own

    def close(self) -> None:
        """Leave the cluster, unless others are in it; one of our own ends."""
        if self._group is not None and not self._head.is_gone:
            remove_placement_group(self._group)
        self._open.discard(self)
        if self._entered and not self._open:
            ray.shutdown()


class Actor:
    """One of them. place: as Ray's scheduling_strategy."""

    def __init__(self, opener: Any, takes: Mapping[str, int], place: Any, head: Head) -> None:
        self._opener, self._takes, self._head = opener, takes, head
        self._since, self._is_placed, self._is_alike = time.monotonic(), False, False
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": place}
        self._actor = _remote_class().options(**takes, **options).remote()
        self._ready = self._actor.difference.remote(facts())
        self.answer: Any = None

    def submit(self, job: Any) -> None:
        """Begin a job."""
        self.answer = self._actor.do.remote(self._opener, job)
        self._opener = None  # it has it: fetched anew, it would cost each job some tenths of a millisecond

    def result(self) -> Any:
        """The answer."""
        if self.is_without_place():
            wanted = " and ".join(f"{count} {kind[4:]}" for kind, count in self._takes.items() if count)
            raise NoPlace(f"no node has had {wanted} to spare for {START_S} s")
        try:
            if not self._is_alike and (difference := ray.get(self._ready)) is not None:
                raise difference  # it may have read the job as something else
            self._is_alike = True
            is_right, found = ray.get(self.answer)
        except (RayActorError, ObjectLostError, OutOfMemoryError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise _not_there(str(error)) from None
            raise WorkerDied(_ending(error)) from None
        if is_right:
            return found
        raise found

    def is_without_place(self) -> bool:
        """Whether it should have had a place by now. It is asked no more once it had one, or is dead."""
        if not self._is_placed:
            self._is_placed = bool(ray.wait([self._ready], timeout=0)[0])
        return not self._is_placed and time.monotonic() - self._since > START_S

    def is_waiting(self) -> bool:
        """Whether it has been without a place for WAIT_S."""
        return time.monotonic() - self._since > WAIT_S and not self.is_without_place() and not self._is_placed

    def kill(self) -> None:
        """End it now. Without the head it ends with this process: to ask for it would never return."""
        if not self._head.is_gone:
            ray.kill(self._actor)


class _Answering:
    """What an actor is."""

    def __init__(self) -> None:
        self._answering: Answering | None = None

    def difference(self, drivers: Mapping[str, str]) -> UsageError | None:
        """Answered as soon as the process is there: what is not as at the driver."""
        try:
            check_same(drivers)
        except UsageError as error:
            return error
        return None

    def do(self, open_worker: Open | None, job: Any) -> tuple[bool, Any]:
        """As Answering; open_worker: with the first job."""
        if self._answering is None:
            assert open_worker is not None, "it comes with the first job"
            self._answering = Answering(open_worker)
        return self._answering(job)


@cache
def _remote_class() -> Any:
    return ray.remote(_Answering)


def _not_there(text: str) -> UsageError:
    """For an actor whose code is not on its node, by what Ray tells of it: a traceback."""
    found = re.search(r"\bip=([^,)]+)", text)
    address = found[1] if found else "a node"
    names = {each["NodeManagerAddress"]: each["NodeManagerHostname"] for each in ray.nodes()}
    return UsageError(
        f"execution: {names.get(address, address)} cannot import a worker ({text.splitlines()[-1].strip()});"
        " the same installation on every node is right"
    )


def _ending(error: Exception) -> str:
    """How an actor ended, in a few words: Ray tells it in ten lines."""
    if isinstance(error, OutOfMemoryError):
        return "its node was out of memory"
    text = str(error)
    for words, meaning in (
        ("node has died", "its node died"),
        ("out of memory", "its node was out of memory"),
    ):
        if words in text:
            return meaning
    return "its process ended"
