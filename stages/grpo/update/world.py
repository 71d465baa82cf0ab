"""world: the processes that train with this one, as `execution.learner` has them: started, joined, ended.

This process is rank 0. The others are workers of execute/ with one job, to follow it (follower.py); they are
there when a learner is wanted, and end with this process, however it ends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from grpo.artifacts import ActiveRun
from grpo.config import Config, ExecutionConfig
from grpo.errors import EngineError, GrpoError, ResourceError, UsageError, first_line
from grpo.execute import Backend, Worker, WorkerDied, backend_of
from grpo.execute.node import facts
from grpo.execute.protocol import NoPlace
from grpo.models.loading import best_device
from grpo.update.follower import Seat, gpu_of, open_follower, there
from grpo.update.launch import refuse
from grpo.update.parallel import PATIENCE, Ranks

_POLL_S = 0.2


@contextmanager
def together(run: ActiveRun) -> Iterator[None]:
    """Until it ends, `run.ranks` are this process and those of `execution.learner`, where that has any.

    Raises UsageError (exit 2) as check_learner(), and for nodes with other versions, ResourceError (exit 7)
    where there is no room for all of them, EngineError (exit 8) where one ends before it has joined.
    """
    execution = run.config.execution
    if execution is None or execution.learner is None or execution.processes == 1 or run.ranks is not None:
        yield
        return
    check_learner(run.config)
    others, threads = execution.processes - 1, torch.get_num_threads()
    with closing(
        backend_of(execution, open_follower, threads, execution.learner.gpus, together=others)
    ) as backend:
        workers = [backend.start() for _ in range(others)]
        try:
            run.ranks = _meet(execution, backend, workers, run.console.stop_requested)
            copies = f", {execution.replicas} replicas" if execution.replicas > 1 else ""
            run.console.say(f"learner: {execution.processes} processes{copies} ({execution.backend})")
            yield
        finally:
            if run.ranks is not None:
                with suppress(GrpoError):  # who cannot be told is ended below
                    run.ranks.end(0, "")
                with suppress(RuntimeError):
                    run.ranks.leave()
                run.ranks = None
            for worker in workers:
                worker.kill()
            if distributed.is_initialized():  # by Ranks() that failed: this process could join no other group
                with suppress(RuntimeError):
                    distributed.destroy_process_group()


def check_learner(config: Config) -> None:
    """Raise UsageError (exit 2) for `execution.learner` that cannot train what is configured, or not here."""
    execution = config.execution
    if execution is None or execution.learner is None or execution.processes == 1:
        return
    refuse(config.update)
    on_gpu, gpus = best_device() == "cuda", execution.learner.gpus
    if execution.backend == "ray" and gpus != on_gpu:
        here = "computes on a GPU" if on_gpu else "has no GPU"
        raise UsageError(
            f"execution.learner.gpus: {gpus}, but this process, which trains with the others, {here};"
            f" {1 - gpus} is right, or another node"
        )
    if on_gpu and execution.backend == "local" and execution.processes > torch.cuda.device_count():
        raise UsageError(
            f"execution.learner.processes: {execution.processes}, but this machine has"
            f" {torch.cuda.device_count()} GPUs, one for each"
        )
    if distributed.is_initialized():
        raise UsageError("execution.learner: this process is one of a group already; start it as one alone")


def _meet(
    execution: ExecutionConfig,
    backend: Backend,
    workers: Sequence[Worker],
    stop_requested: Callable[[], None],
) -> Ranks:
    world, device = execution.processes, best_device()
    store = TCPStore(backend.host, 0, world, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    for rank, worker in enumerate(workers, 1):
        gpu = rank if execution.backend == "local" else 0  # Ray shows each its own alone
        own = torch.get_num_threads(), Path.cwd(), facts(), execution.replicas
        worker.submit(Seat(backend.host, store.port, rank, world, device, gpu, *own))
    names = [there(rank) for rank in range(1, world)]
    while not store.check(names):
        for worker in backend.wait(workers, _POLL_S):
            _raise_answer(worker, workers.index(worker) + 1, len(workers))
        stop_requested()
    _require_own_gpus([gpu_of(device), *(store.get(name).decode() for name in names)])
    try:
        return Ranks(store, 0, world, device, are_own=True, replicas=execution.replicas)
    except RuntimeError as error:
        raise EngineError(
            f"execution.learner: the processes do not reach each other ({first_line(error)}); a host's own"
            " name has to be an address for the others, or GLOO_SOCKET_IFNAME the interface that is"
        ) from error


def _raise_answer(worker: Worker, rank: int, others: int) -> None:
    """Of one that should not have answered yet."""
    try:
        worker.result()
    except WorkerDied as death:
        raise EngineError(f"execution.learner: rank {rank} ended as it began: {death}") from None
    except NoPlace as refusal:
        raise ResourceError(
            f"execution.learner: {refusal} for each of {others} processes beside this one; what is committed"
            " is kept, and `grpo doctor` counts what engines and learner take"
        ) from None


def _require_own_gpus(gpus: Sequence[str]) -> None:
    """gpus: by rank. Raises UsageError (exit 2) where two ranks have the same one."""
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank]:
            raise UsageError(
                f"execution.learner: ranks {gpus.index(gpu)} and {rank} have the same GPU; the one of this"
                " process is not the cluster's: `ray start` on this node without it (CUDA_VISIBLE_DEVICES)"
            )
