"""groups: processes of a group, for tests: rank 0 does something, the others follow."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tests import forked
from torch import distributed

from grpo.update.parallel import Ranks

WORLD = 2


def store(folder: Path, name: str, world: int = WORLD) -> Any:
    """Where the processes of a group meet; of each group another one."""
    return distributed.FileStore(str(folder / name), world)  # type: ignore[attr-defined]


def start(
    process: Callable[..., None], folder: Path, scenes: Sequence[str] = ("",), world: int = WORLD
) -> list[int]:
    """Run process(rank, folder), with each of several scenes behind it at once; exit codes, by rank."""
    started = [
        forked.CONTEXT.Process(target=process, args=(rank, folder, *([scene] if scene else [])))
        for scene in scenes
        for rank in range(world)
    ]
    for each in started:
        each.start()
    codes: list[int | None] = [None]
    while None in codes:
        codes = [each.exitcode for each in started]  # all are asked, and who ended is there no more then
        time.sleep(0.05)
    return [code for code in codes if code is not None]


def lead(rank: int, folder: Path, work: Callable[[Ranks], Any], world: int = WORLD) -> None:
    """In a process: work(ranks) on rank 0, what it returns to `0.pt`; how the others ended to `1.pt`."""
    torch.set_num_threads(1)
    ranks = Ranks(store(folder, "meeting", world), rank, world, patience=timedelta(seconds=60))
    if rank == 0:
        found: Any = work(ranks)
        ranks.end(0, "")
    else:
        found = ranks.follow()
    torch.save(found, folder / f"{rank}.pt")
    ranks.leave()
