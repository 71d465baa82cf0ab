"""parallel: the processes of a group that train one learner together; rank 0 leads, the others follow.

Rank 0 alone is the driver: it locks, plans, samples, scores and commits. What it calls on a learner it sends
to the others, who call the same; between calls they wait, without end and without work. An error of any
process is the error of all: what a call found is exchanged before it ends. Who cannot go on ends, its
connections with it, and the others end because of that: nothing is committed by a part of them.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from grpo.errors import EngineError, GrpoError
from grpo.models.refusals import is_of_connection
from grpo.update import sharding
from grpo.update.batch import Rollouts
from grpo.update.roll_call import RollCall, place

PATIENCE = timedelta(minutes=10)
"""Of a process that waits for another one's part of a computation."""
_BETWEEN_CALLS = timedelta(days=365)  # rank 0 samples and scores meanwhile
_LAST_WORDS_S = 30.0  # that a process which failed waits for the others to come
T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """With what rank 0 ended. line: empty where it failed with nothing that the others had a part in."""

    exit_code: int
    line: str = ""


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    learner: int
    made: tuple[Any, ...] | None  # its class and arguments, where it is new
    gone: list[int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AsBefore:
    """Stands for the rollouts that were sent last."""


class Ranks:
    """This process and the others of its group. Made in all of them at once, from one store.

    device: cpu, or cuda, which is then this process's own. patience: see PATIENCE. are_own: whether rank 0
    started the others, and can start them again. replicas: copies of all weights, which divide the world.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        device: str = "cpu",
        patience: timedelta = PATIENCE,
        are_own: bool = False,
        replicas: int = 1,
    ) -> None:
        self.rank, self.world, self.device, self.patience = rank, world, device, patience
        self.are_own, self.replicas = are_own, replicas
        self.is_inside = False
        self.failure: GrpoError | None = None
        """The last that all processes raised."""
        self.is_broken = False
        """Whether the others can be reached no more, or are elsewhere."""
        self.notes: list[str] = []
        """What of a call is to be said by whoever has a console."""
        group = distributed.PrefixStore("grpo", store)  # type: ignore[attr-defined]
        backend = "gloo" if device == "cpu" else "nccl"
        distributed.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=patience)
        self._findings = distributed.new_group(backend="gloo", timeout=patience)
        # Apart: another's agreement must not be taken for a part of the call that one is still within.
        self._agreement = distributed.new_group(backend="gloo", timeout=patience)
        self._calls = distributed.new_group(backend="gloo", timeout=_BETWEEN_CALLS)
        self.mesh = sharding.mesh_of(device, world, replicas)
        self._roll_call = RollCall(group, rank, patience, self.to_all(place()))
        self._learners: dict[int, Any] = {}
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._gone: list[int] = []
        self._made = self._count = 0
        self._rollouts: Rollouts | None = None

    # What rank 0 does, and the others after it

    def lead(
        self,
        function: Callable[..., T],
        learner: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> T:
        """Call `function` on a learner here and on its like in the others. Raises what all of them raise."""
        self._require_whole()
        given = dict(kwargs or {})
        gone, self._gone[:] = [*self._gone], []
        made = None if learner in self._numbers else (type(learner), learner.made_with)
        number = self._numbers.setdefault(learner, self._made)
        if made is not None:
            self._made += 1
            weakref.finalize(learner, self._gone.append, number).atexit = False
        sent = {name: self._as_sent(value) for name, value in given.items() if not callable(value)}
        call = _Call(function, number, made, gone, tuple(map(self._as_sent, args)), sent)
        with self._breaking():
            distributed.broadcast_object_list([call], 0, self._calls)
        return self._together(lambda: function(learner, *args, **given))

    def follow(self) -> Ended:
        """Do what rank 0 leads, until it ends. Raises what this process alone cannot go on with."""
        while True:
            received: list[Any] = [None]
            with self._breaking():
                distributed.broadcast_object_list(received, 0, self._calls)
            call = received[0]
            if isinstance(call, Ended):
                return call
            try:
                self._together(partial(self._called, call))
            except GrpoError:
                if self.is_broken:
                    raise  # else rank 0 knows it too, and says what follows

    def end(self, exit_code: int, line: str) -> None:
        """The last word of this process. line: with which its command fails; empty where it does not.

        The others end with rank 0; with any process that goes on no more while they wait for it.
        """
        self._roll_call.say_last(line, exit_code)
        if self.rank == 0 and not self.is_broken:
            shared = self.failure is not None and str(self.failure) == line
            with self._breaking():
                distributed.broadcast_object_list([Ended(exit_code, line if shared else "")], 0, self._calls)

    def leave(self) -> None:
        """Give the group up, together with the others where they can be reached."""
        self._learners.clear()
        try:
            if not self.is_broken:
                distributed.barrier(self._findings)  # gloo aborts who leaves while another one still connects
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    # Within a call

    def most(self, count: int) -> int:
        """The largest count of all processes."""
        return int(self._reduced(torch.tensor(count), distributed.ReduceOp.MAX))

    def any(self, found: bool) -> bool:
        """Whether any process found it."""
        return bool(self.most(int(found)))

    def to_first(self, value: T) -> list[T]:
        """`value` of every process, on rank 0; elsewhere that one's own."""
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(value, parts, 0, self._findings)
        return [value] if parts is None else parts

    def from_first(self, value: T) -> T:
        """What rank 0 has."""
        held: list[Any] = [value]
        distributed.broadcast_object_list(held, 0, self._findings)
        found: T = held[0]
        return found

    def to_all(self, value: T, *, patiently: bool = False) -> list[T]:
        """`value` of every process. patiently: however long one of them takes to come."""
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, value, self._calls if patiently else self._findings)
        return parts

    def agreed(self, work: Callable[[], T]) -> T:
        """What needs no other process; all raise what one of them raises, before they go on together."""
        error: GrpoError | OSError | MemoryError | None = None
        try:
            found = work()
        except (GrpoError, OSError, MemoryError) as caught:
            error = caught
        self._agree(error)
        return found

    def gather(self, tensors: Mapping[str, Tensor], kept: Collection[str] | None = None) -> dict[str, Tensor]:
        """Those called `kept` whole, in main memory, gathered one after another; None: on rank 0 all."""
        return sharding.gather(tensors, (tensors if self.rank == 0 else ()) if kept is None else kept)

    full = staticmethod(sharding.full)
    local = staticmethod(sharding.local)
    placed = staticmethod(sharding.placed)
    materialize = staticmethod(sharding.materialize)
    skeleton = staticmethod(sharding.Skeleton)
    put = staticmethod(sharding.put)
    gather_in = staticmethod(sharding.gather_in)

    def shard(self, reader: torch.nn.Module) -> None:
        """See sharding.shard()."""
        sharding.shard(reader, self.mesh)

    # How they stay together

    def _called(self, call: _Call) -> Any:
        for number in call.gone:
            self._learners.pop(number, None)
        if call.made is not None:
            kind, made_with = call.made
            self._learners[call.learner] = kind(*made_with, ranks=self)
        kwargs = {name: self._as_received(value) for name, value in call.kwargs.items()}
        return call.function(self._learners[call.learner], *map(self._as_received, call.args), **kwargs)

    def _together(self, work: Callable[[], T]) -> T:
        """Do this process's part, and raise in all of them what one of them raises."""
        error: GrpoError | OSError | MemoryError | None = None
        self.is_inside = True
        self._count += 1
        try:
            with self._breaking():
                try:
                    found = work()
                except (GrpoError, OSError, MemoryError) as caught:
                    if self.is_broken:
                        raise
                    error = caught
                self._agree(error)
        finally:
            self.is_inside = False
        return found

    def _agree(self, error: GrpoError | OSError | MemoryError | None) -> None:
        failed = torch.zeros(self.world, dtype=torch.int32)
        if error is not None:
            failed[self.rank] = 1
            code = error.exit_code if isinstance(error, GrpoError) else 7
            self._roll_call.say(self._count, str(error), code)
        work = distributed.all_reduce(failed, group=self._agreement, async_op=True)
        try:
            work.wait(self.patience if error is None else timedelta(seconds=_LAST_WORDS_S))
        except RuntimeError:
            if error is None:
                raise
            self.is_broken = True  # others wait for this one elsewhere: it ends, and so do they
            raise error from None
        if not failed.any():
            return
        first = int(failed.nonzero()[0])
        own = error if first == self.rank and isinstance(error, GrpoError) else None
        self.failure = own or self._roll_call.said(self._count, first)
        assert self.failure is not None
        raise self.failure

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        distributed.all_reduce(value, operation, self._findings)
        return value

    def _as_sent(self, value: Any) -> Any:
        if not isinstance(value, Rollouts):
            return value
        if value is self._rollouts:
            return _AsBefore()
        self._rollouts = value
        return value

    def _as_received(self, value: Any) -> Any:
        if isinstance(value, Rollouts):
            self._rollouts = value
        return self._rollouts if isinstance(value, _AsBefore) else value

    def _require_whole(self) -> None:
        if self.is_broken:
            raise EngineError("update: the other processes cannot be reached any more; nothing was committed")

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Whatever leaves this, but for what all raise, leaves the others elsewhere."""
        are_together = False
        try:
            yield
            are_together = True
        except GrpoError as error:
            are_together = error is self.failure
            raise
        except RuntimeError as error:  # torch's own, of its connections; a bug of ours is one too
            if not is_of_connection(error):
                raise
            raise self._roll_call.account(self._count) from error
        finally:
            self.is_broken = self.is_broken or not are_together
