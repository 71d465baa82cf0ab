"""What two processes take to load a model that they share: each all of it first, or its own part alone.

Each way in processes of its own, started by torchrun. MiB more than before: `peak` is the most that was
resident (VmHWM), pages of the checkpoint's file among it, which processes share and the kernel takes back;
`own` the most of it that was no file's, looked at every 5 ms; `held` what is its own once it is loaded;
`read` the most of its own in a first read of 8 tokens, for which layers are gathered, one after the other,
and what is no layer. Then whether both ways gave the same bits.

python examples/capitals/model.py FOLDER
python benchmarks/load_memory.py FOLDER > benchmarks/load_memory.txt
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from machine import describe
from safetensors import safe_open

from grpo.models.attention import is_causal
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.slices import slices_of
from grpo.update.execution import weights_digest
from grpo.update.launch import open_ranks
from grpo.update.opening import filled_reader
from grpo.update.parallel import Ranks

WORLD, MIB, PAUSE_S = 2, 2**20, 0.005


def whole(checkpoint: Path, ranks: Ranks) -> Reader:
    """All weights in each process, of which it keeps its part."""
    reader = Reader(load_model(checkpoint, "cpu"))
    ranks.shard(reader)
    return reader


def slices(checkpoint: Path, ranks: Ranks) -> Reader:
    """As the learner loads."""
    found = slices_of(checkpoint, "auto")
    assert found is not None
    return filled_reader(found, ranks, lambda model: None)


WAYS: dict[str, Callable[[Path, Ranks], Reader]] = {"whole": whole, "slices": slices}


def main() -> None:
    checkpoint = Path(sys.argv[1])
    if len(sys.argv) > 2:
        compute(checkpoint, Path(sys.argv[2]), sys.argv[3])
        return
    print(describe())
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        count = sum(len(file.get_tensor(name).flatten()) for name in file.keys())  # noqa: SIM118 - no mapping
    print(f"{count / 1e6:.1f}M parameters, {4 * count / MIB:,.0f} MiB in float32; {WORLD} processes\n")
    print("             s   rank   peak    own   held   read, MiB")
    digests = set()
    for way in WAYS:
        rows = run(checkpoint, way)
        for rank, row in enumerate(rows):
            name, seconds = (way, f"{row['seconds']:.1f}") if rank == 0 else ("", "")
            sizes = " ".join(f"{row[kind]:6,.0f}" for kind in ("peak", "own", "held", "read"))
            print(f"{name:7}  {seconds:>5}   {rank:4} {sizes}")
            digests.add(row["digest"])
    print(f"\nthe same bits: {len(digests) == 1}")


def run(checkpoint: Path, way: str) -> list[dict[str, float]]:
    """What each process took."""
    with tempfile.TemporaryDirectory() as name:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
        command = [sys.executable, *torchrun, __file__, str(checkpoint), name, way]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=sys.stderr)
        return [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(WORLD)]


def compute(checkpoint: Path, folder: Path, way: str) -> None:
    """In a process."""
    ranks = open_ranks()
    ctypes.CDLL(None).malloc_trim(0)
    before, own = memory("VmRSS"), memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    most, is_over = [own], Event()
    watcher = Thread(target=watch, args=(most, is_over))
    watcher.start()
    started = time.monotonic()
    reader = WAYS[way](checkpoint, ranks)
    seconds, peak = time.monotonic() - started, memory("VmHWM") - before
    loaded = max(most)
    ctypes.CDLL(None).malloc_trim(0)
    most[:] = [memory("RssAnon")]
    sizes = {"peak": peak, "own": loaded - own, "held": most[0] - own}
    reader.ask(is_causal)
    is_over.set()
    watcher.join()
    sizes["read"] = max(most) - own
    found: dict[str, Any] = {name: size / MIB for name, size in sizes.items()}
    found |= {"seconds": seconds, "digest": weights_digest(reader.model, ranks.full)}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.leave()


def watch(most: list[int], is_over: Event) -> None:
    while not is_over.wait(PAUSE_S):
        most.append(memory("RssAnon"))


def memory(name: str) -> int:
    """Bytes of this process, by its name in /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
