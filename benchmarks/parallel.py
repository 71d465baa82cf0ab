"""The learner on two processes against one: a step's time, memory and gradient; and whether bits repeat.

Three optimiser steps of a Llama of 30M parameters in float32, random weights, 2 groups of 8 rollouts; each
case in processes of its own, two processes by torchrun, and twice. Seconds are processor time of rank 0, of
the median step after the first; memory is the peak of a process, and what it holds after the steps. Gradients
are compared before they are clipped.

Then a checkpoint, in files of 64 MiB: seconds by the clock until all are on disk, and what a process takes
beside what it held before, at the most, and in bytes a parameter of the model.

python benchmarks/parallel.py > benchmarks/parallel.txt
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from memory import LLAMA
from transformers import LlamaForCausalLM

from grpo.artifacts import files, write_apart
from grpo.config import UpdateConfig
from grpo.update.batch import Rollouts
from grpo.update.collective import collective
from grpo.update.given import Step
from grpo.update.launch import open_ranks
from grpo.update.learner import Learner
from grpo.update.objective import Stored
from grpo.update.own_files import own_files

GROUPS, K, PROMPT, RESPONSE, STEPS = 2, 8, 128, 40, 3
FILE_BYTES = 2**26
CASES = ("1 process", "2 processes")
MIB = 2**20


def main() -> None:
    if len(sys.argv) > 1:
        compute(Path(sys.argv[1]), sys.argv[2])
        return
    print(describe())
    print("\n             step s  peak MiB  weights and moments, MiB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        family: Any = LlamaForCausalLM  # annotated in some releases only
        family(LLAMA).save_pretrained(folder / "llama")
        one, two, again = run(folder, "1 process", 1), run(folder, "2 processes", 2), run(folder, "again", 2)
        three = run(folder, "3 processes", 3)
        gradients_of = [torch.load(folder / f"{case}.pt") for case in CASES]
    for case, row in zip(CASES, (one, two), strict=True):
        held = ", ".join(f"{each:,.0f}" for each in row["held"])
        print(f"{case:11} {row['step']:7.2f} {max(row['peak']):9,.0f}  {held}")
    first, second = gradients_of
    apart = max(float((second[name] - first[name]).norm() / first[name].norm()) for name in first)
    norm = abs(two["norm"] - one["norm"]) / one["norm"]
    print("\ntwo processes against one, relative")
    print(f"  gradient of the worst parameter  {apart:.1e}")
    print(f"  norm of the gradient             {norm:.1e}")
    print(f"two processes twice: bits after {STEPS} steps equal: {again['digest'] == two['digest']}")
    print("\na checkpoint   s   MiB more, of each process   bytes a parameter   files of each")
    for case, row in zip((*CASES, "3 processes"), (one, two, three), strict=True):
        more = ", ".join(f"{each / MIB:,.0f}" for each in row["more"])
        each = ", ".join(f"{each / row['parameters']:.1f}" for each in row["more"])
        print(f"{case:11} {row['write']:5.2f}   {more:25}   {each:17}   {', '.join(map(str, row['files']))}")


def run(folder: Path, case: str, world: int) -> dict[str, Any]:
    """What a case took, of each process."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)] if world > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, __file__, str(folder), case]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(world)]
    several = ("peak", "held", "more", "files")
    return {**rows[0], **{name: [row[name] for row in rows] for name in several}}


def compute(folder: Path, case: str) -> None:
    """In a process of a case."""
    ranks = open_ranks() if os.environ.get("WORLD_SIZE", "1") != "1" else None
    rank = 0 if ranks is None else ranks.rank
    measured = {}
    if rank == 0:
        learner = Learner(
            UpdateConfig.model_validate({"kl_coefficient": 0.0, "max_grad_norm": None}), "cpu", ranks=ranks
        )
        learner.load(folder / "llama", None, "start")
        measured = measure(learner, folder / f"{case}.pt")
        note(learner, str(folder / case))
        started = time.perf_counter()
        checkpoint(learner, folder / "llama", str(folder / case))
        measured["write"] = time.perf_counter() - started
    if ranks is not None:
        ranks.end(0, "") if rank == 0 else ranks.follow()
        ranks.leave()
    path = folder / f"{case}-{rank}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | measured))


def measure(learner: Learner, gradient: Path) -> dict[str, Any]:
    """Of rank 0: seconds, and a digest of the weights at the end; the first gradient goes to a file."""
    rollouts, everything, seconds = make_rollouts(), np.arange(GROUPS * K), []
    step = Step(GROUPS * K, GROUPS * K * RESPONSE, RESPONSE, GROUPS)
    for number in range(STEPS):
        started = time.process_time()
        row, _ = learner.step(rollouts, everything, step, Stored())
        seconds.append(time.process_time() - started)
        if number == 0:
            torch.save(gradients(learner), gradient)
            norm = row["grad_norm"]
    return {
        "step": statistics.median(seconds[1:]),
        "digest": learner.digest(),
        "norm": norm,
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
    }


@collective
def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Whole, on rank 0."""
    found = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    return found if learner.ranks is None else learner.ranks.gather(found)


@collective
def note(learner: Learner, name: str) -> None:
    """The memory of each process, to a file."""
    rank, local = (
        (0, torch.Tensor.detach) if learner.ranks is None else (learner.ranks.rank, learner.ranks.local)
    )
    tensors = [*learner.model.parameters()]
    tensors += [t for state in learner.optimizer.state.values() for t in state.values()]
    held = sum(local(tensor).nbytes for tensor in tensors) / MIB
    Path(f"{name}-{rank}.json").write_text(json.dumps({"peak": memory("VmHWM") / MIB, "held": held}))


@collective
def checkpoint(learner: Learner, start: Path, name: str) -> None:
    """Written by all processes, each its files; what it took of each is added to note()."""
    rank = 0 if learner.ranks is None else learner.ranks.rank
    learner.model.zero_grad(set_to_none=True)  # as release() does before anything is written
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to be used again: it would not be seen
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    folder = Path(f"{name}-files")
    for part in ("policy", "optimizer"):
        files.make_folder(folder / part)
    own = own_files(learner, start, FILE_BYTES)
    for part, file, content in own:
        write_apart(folder, part, file, "new", content)
    if learner.ranks is not None:
        learner.ranks.to_all(None)
    path = Path(f"{name}-{rank}.json")
    found = {"more": memory("VmHWM") - before, "files": len(own)}
    path.write_text(json.dumps(json.loads(path.read_text()) | found))


def memory(name: str) -> int:
    """Bytes of this process, by its name in /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def make_rollouts() -> Rollouts:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, LLAMA.vocab_size, PROMPT) for _ in range(GROUPS)]
    rows = GROUPS * K
    return Rollouts(
        keys=np.array([[0, row // K, row % K] for row in range(rows)]),
        prompts=[prompts[row // K] for row in range(rows)],
        responses=[draw.integers(1, LLAMA.vocab_size, RESPONSE) for _ in range(rows)],
        masks=[np.ones(RESPONSE, dtype=bool)] * rows,
        old_logprobs=[draw.normal(-9, 0.3, RESPONSE).astype(np.float32) for _ in range(rows)],
        advantages=draw.normal(size=rows),
        temperatures=np.ones(rows),
    )


if __name__ == "__main__":
    main()
