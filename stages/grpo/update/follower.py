"""follower: a process that a driver started for its learner: it joins the group and follows rank 0."""

import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from grpo.errors import GrpoError, ResourceError
from grpo.execute.node import check_same
from grpo.update.parallel import PATIENCE, Ranks
from grpo.update.roll_call import place


@dataclass(frozen=True)
class Seat:
    """What a process needs to know of its place in the group.

    host, port: where they meet. gpu: which one is its own, where `device` is cuda. threads, folder, facts:
    the driver's own, which have to be the same here. replicas: of the weights.
    """

    host: str
    port: int
    rank: int
    world: int
    device: str
    gpu: int
    threads: int
    folder: Path
    facts: Mapping[str, str]
    replicas: int


def open_follower() -> Callable[[Seat], None]:
    """As a worker's (execute/)."""
    return follow


def follow(seat: Seat) -> None:
    """Compute with rank 0 until it ends.

    Once it has joined, whatever goes wrong ends this process, its connections with it: so the others know.
    Raises UsageError (exit 2) for another version or source here, ResourceError (exit 7) without the folder.
    """
    check_same(seat.facts)
    try:
        os.chdir(seat.folder)  # policies and the user's files are named from there
    except OSError as error:
        raise ResourceError(
            f"execution.learner: {place()[0]} does not see {seat.folder} ({error.strerror}); it and the"
            " artifacts have to be on a store that every node has at the same path"
        ) from None
    torch.set_num_threads(seat.threads)
    if seat.device == "cuda":
        torch.cuda.set_device(seat.gpu)
    store = TCPStore(seat.host, seat.port, seat.world, is_master=False, timeout=PATIENCE)
    store.set(there(seat.rank), gpu_of(seat.device))
    is_over = False
    try:
        _serve(Ranks(store, seat.rank, seat.world, seat.device, replicas=seat.replicas))
        is_over = True
    finally:
        if not is_over:
            traceback.print_exc()
            os._exit(1)


def _serve(ranks: Ranks) -> None:
    try:
        ranks.end(ranks.follow().exit_code, "")
        ranks.leave()
    except GrpoError as error:  # rank 0 says it
        with suppress(GrpoError, RuntimeError):
            ranks.end(error.exit_code, str(error))
        os._exit(error.exit_code)


def there(rank: int) -> str:
    """The key under which a process says that it is about to join, and which GPU it has."""
    return f"there/{rank}"


def gpu_of(device: str) -> str:
    """What no other GPU is named; empty on a CPU."""
    return "" if device == "cpu" else str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
