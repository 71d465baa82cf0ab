"""groups: processes of a group, for tests: rank 0 does something, the others follow."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from grpo.update.parallel import Ranks

WORLD = 2


def store(folder: Path, name: str) -> Any:
    """Where the processes of a group meet; of each group another one."""
    return distributed.FileStore(str(folder / name), WORLD)  # type: ignore[attr-defined]


def start(process: Callable[[int, Path], None], folder: Path) -> None:
    """Run process(rank, folder) in WORLD processes; raises where one fails."""
    multiprocessing.spawn(process, args=(folder,), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]


def lead(rank: int, folder: Path, work: Callable[[Ranks], Any]) -> None:
    """In a process: work(ranks) on rank 0, what it returns to `0.pt`; how the others ended to `1.pt`."""
    torch.set_num_threads(1)
    ranks = Ranks(store(folder, "meeting"), rank, WORLD, patience=timedelta(seconds=60))
    if rank == 0:
        found: Any = work(ranks)
        ranks.end(0, "")
    else:
        found = ranks.follow()
    torch.save(found, folder / f"{rank}.pt")
    ranks.leave()
