"""vllm_transfer: a policy in this process's memory -> engines in others, by vLLM's own transfer.

vLLM's trainer half runs here and leads: it has a client do each step with all engines while it sends. An
engine that dies meanwhile costs time alone: what is sent stays as it is until all have it.
"""

import socket
from collections.abc import Callable, Iterator
from textwrap import shorten
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from grpo.errors import EngineError, GrpoError, ResourceError
from grpo.execute import Pool, WorkerDied
from grpo.execute.pool import MOST_DEATHS
from grpo.generate.worker import OpenEngine
from grpo.models.loading import best_device
from grpo.models.weight_check import WeightCheck
from grpo.models.weights import Weights, published_state

_POLL_S = 0.05
_GRACE_S = 5.0  # in which a transfer that was broken off ends, if it ends
_BUFFER_BYTES = 2**28  # two on each GPU while weights are sent; vLLM's own are of 1 GiB, beside its share


def nccl(host: str, port: int, world: int) -> TrainerInitInfo:
    """NCCL, in a group of `world` processes that meets at host and port; this one is its first."""
    return NCCLTrainerInitInfo(host, port, world, rank=0, packed_buffer_size_bytes=_BUFFER_BYTES)


class TransferStep(NamedTuple):
    """Do a step of vLLM's transfer."""

    step: str
    info: dict[str, Any]

    def __call__(self, opened: OpenEngine) -> None:
        """Do it; the engine holds no policy until the last one."""
        opened.sync.holds = None
        opened.engine.transfer(self.step, **self.info)  # type: ignore[attr-defined]  # vLLM's alone


class Taken(NamedTuple):
    """The last step: the weights are there."""

    policy_id: str
    check: WeightCheck

    def __call__(self, opened: OpenEngine) -> tuple[float, list[str]]:
        """The difference of the weight check, and what the engine has said."""
        TransferStep("finish_weight_update", {})(opened)
        return opened.sync.prove(self.policy_id, self.check), opened.tell()


def be_open(opened: OpenEngine) -> None:
    """A job that is done as soon as its engine is open."""


class Policy(WeightSource):  # type: ignore[misc]  # vLLM has no types
    """What is sent: a policy's weights under the names of its checkpoint. It is another one each time."""

    weights: Weights | None = None

    def metadata(self) -> list[ParamMeta]:
        """Names, types and shapes of what is sent; nothing is copied for it but where merging needs to."""
        assert self.weights is not None
        state = published_state(self.weights.model)
        return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in state.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self.weights is not None
        device = best_device()
        for name, each in self.weights.published():
            if self.weights is None:  # nobody waits for it any more, and whoever trains changes them
                raise WorkerDied("the transfer was broken off")
            yield name, each.to(device)


class Sender:
    """Sends policies to the engines of a pool. gpus: of each engine.

    meeting: what makes a group of host, port and number of processes.
    """

    def __init__(
        self, pool: Pool, gpus: int, meeting: Callable[[str, int, int], TrainerInitInfo] = nccl
    ) -> None:
        self._pool, self._gpus, self._meeting = pool, gpus, meeting
        self._group: TransferGroup | None = None

    def send(
        self,
        weights: Weights,
        policy_id: str,
        check: WeightCheck,
        what: str,
        stop_requested: Callable[[], None],
    ) -> list[tuple[float, list[str]]]:
        """Have all engines hold a policy, opened where need be; what `Taken` tells, of each.

        Raises EngineError (exit 8) where one's weights are stale then, or the transfer fails, ResourceError
        (exit 7) where engines end again and again, and as Pool.run().
        """
        for _ in range(MOST_DEATHS):
            opening = {f"engine {number}": be_open for number in range(self._pool.count)}
            for _ in self._pool.run(opening, what, stop_requested):
                pass
            if self._group is None or self._group.members != frozenset(self._pool.idle):
                self.leave()
                self._group = TransferGroup(self._pool, self._gpus, self._meeting)
            try:
                return self._group.send(weights, Taken(policy_id, check), what)
            except WorkerDied as death:
                ending = death
                self.leave()
            except BaseException:
                self.leave()
                raise
        raise ResourceError(
            f"{what}: {MOST_DEATHS} times an engine ended while it was sent a policy ({ending}); what is"
            " committed is kept, and the same command tries again"
        )

    def leave(self) -> None:
        """End the group; the next policy makes another one."""
        group, self._group = self._group, None
        if group is not None:
            group.leave()


class TransferGroup:
    """This process and all engines that are open; vLLM's client of them.

    Of no use once anything has failed in it: a thread that hangs there is left behind, and can neither ask
    engines nor end a group that came later.
    """

    def __init__(self, pool: Pool, gpus: int, meeting: Callable[[str, int, int], TrainerInitInfo]) -> None:
        self._pool, self._gpus, self._meeting = pool, gpus, meeting
        self.members = frozenset(pool.idle)
        self._policy, self._taken = Policy(), Taken("", WeightCheck([], []))
        self._trainer: TrainerWeightTransferEngine | None = None
        self._answers: list[tuple[float, list[str]]] = []
        self._failures: list[BaseException] = []

    def send(self, weights: Weights, taken: Taken, what: str) -> list[tuple[float, list[str]]]:
        """What `taken` tells, of each engine. Raises as Sender.send(), and WorkerDied."""
        self._policy.weights, self._taken = weights, taken
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        sending = Thread(target=self._try, args=(gpu,), name="weight-transfer", daemon=True)
        sending.start()
        try:
            while sending.is_alive() and not self._failures:
                sending.join(_POLL_S)
            for error in self._failures[:1]:  # what follows from it is no news
                sending.join(_GRACE_S)  # who waits for a process that has died may wait for ever
                if isinstance(error, WorkerDied | GrpoError) or not isinstance(error, Exception):
                    raise error
                text = shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")
                raise EngineError(
                    f"{what}: vLLM's weight transfer failed: {text}; `execution.weights: disk` does without"
                ) from error
        except BaseException as error:  # of a signal, too
            self._failures.append(error)
            raise
        finally:
            self._policy.weights = None
        return self._answers

    def _try(self, gpu: int | None) -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins at the first
            self._trainer = self._trainer or self._meet()
            self._trainer.send_weights()
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            self._failures.append(error)
            self.leave()

    def _meet(self) -> TrainerWeightTransferEngine:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        group = self._meeting(self._pool.host, port, 1 + len(self.members) * self._gpus)
        return WeightTransferTrainerFactory.trainer_init(group, client=self, source=self._policy)

    def leave(self) -> None:
        """End it: who waits in it waits no more."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.shutdown()

    def _ask_all(self, jobs: list[Any]) -> list[Any]:
        """The engines' answers; vLLM may call from a thread, while another one is sending."""
        if self._failures:
            raise WorkerDied("the transfer was broken off")
        try:
            return self._pool.ask_all(jobs)
        except BaseException as error:
            self._failures.append(error)
            self.leave()
            raise

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have each engine join, at a place of its own."""
        places = range(1, 1 + len(self.members) * self._gpus, self._gpus)
        infos = [init_info | {"rank_offset": place} for place in places]
        self._ask_all([TransferStep("init_weight_transfer_engine", {"init_info": info}) for info in infos])

    def start_weight_update(self) -> None:
        """Have all begin."""
        self._ask_all([TransferStep("start_weight_update", {})] * len(self.members))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have all take what is sent meanwhile."""
        step = TransferStep("update_weights", {"update_info": update_info})
        self._ask_all([step] * len(self.members))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have all end, and prove that they have it."""
        self._answers = self._ask_all([self._taken] * len(self.members))
