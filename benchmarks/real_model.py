"""What an iteration of a real model, of 135M parameters, costs: processor seconds by part, bytes, opening.

Runs examples/capitals without `evaluate`, all weights and then a LoRA, in this process and in one thread.
Work is sampling (`sample`) and forward, backward and optimiser (`train`; with a reference, its forward);
`between` is what is outside of every timed part: plans, commits, the loop, and checkpoints that are written
beside the work. Bytes are what the kernel counts as written to disks by this process: nothing, where the
temporary folder is in memory.

Last, opening: what it takes until an engine has shown that it follows new weights, against loading the model
once; in turn, and the median of each.

Run: python benchmarks/real_model.py [MODEL_DIR [ITERATIONS]]       result: benchmarks/real_model.txt
MODEL_DIR: SmolLM2-135M-Instruct, written where it is not there (examples/capitals/model.py)
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: all work is then in the main thread

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple
from unittest.mock import patch

from machine import describe

from grpo import cli
from grpo.artifacts import Manifest, Staging
from grpo.generate.engines.transformers_engine import TransformersEngine
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import LENGTH, WeightCheck, measure
from grpo.pipeline import lane
from grpo.pipeline.stages import perform

EXAMPLE = Path(__file__).parents[1] / "examples" / "capitals"
WORK = ("sample", "tail", "train", "reference", "recompute")
WARM = 2  # iterations that are not counted: what is opened, and what is met for the first time
SETTINGS = {"full": [], "lora": ["update.lora={rank: 16, alpha: 32}", "update.learning_rate=2.0e-4"]}
OPENINGS = 5


class Moment(NamedTuple):
    """Seconds of the process and of the wall, and bytes written, all since it began."""

    cpu: float
    wall: float
    written: float

    @classmethod
    def now(cls) -> "Moment":
        """Of this moment, with processes that ended."""
        children = os.times()
        cpu = time.process_time() + children.children_user + children.children_system
        return cls(cpu, time.perf_counter(), written())

    def since(self, before: "Moment") -> "Moment":
        """What lies between."""
        return Moment(*(after - start for after, start in zip(self, before, strict=True)))


def written() -> int:
    """Bytes that this process has had written to disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("write_bytes")))


@dataclass
class Meter:
    """Iterations as they end, and processor seconds by iteration, stage and part.

    With those of threads that a part uses, as autograd and transformers do; not of the one that writes.
    """

    ends: list[Moment] = field(default_factory=list)
    parts: dict[tuple[int, str, str], float] = field(default_factory=lambda: defaultdict(float))
    peak_kib: int = 0
    _inner: list[float] = field(default_factory=list)
    _beside: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what runs within."""
        clock = Staging.clock

        def performed(run: Any, stage: Any, *others: Any) -> Manifest:
            manifest = perform(run, stage, *others)
            if stage.name == "update":
                self.ends.append(Moment.now())
            return manifest

        @contextmanager
        def clocked(staging: Staging, part: str) -> Iterator[None]:
            with clock(staging, part), self._part(staging.plan.stage, part):
                yield

        with patch.object(lane, "perform", performed), patch.object(Staging, "clock", clocked):
            self.ends.append(Moment.now())
            yield
            self.ends.append(Moment.now())
            self.peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @contextmanager
    def _part(self, stage: str, part: str) -> Iterator[None]:
        """What is done in a part within this one is not of this one; nor what is written beside it."""
        if threading.current_thread() is not threading.main_thread():  # a checkpoint
            started = time.thread_time()
            yield
            self._beside += time.thread_time() - started
            return
        started, beside = time.process_time(), self._beside
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.process_time() - started - (self._beside - beside)
            self.parts[len(self.ends) - 1, stage, part] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def iterations(self) -> list[Moment]:
        """What each iteration took."""
        ends = self.ends[:-1]
        return [after.since(before) for before, after in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("iterations", nargs="?", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = (given.model or folder / "model").absolute()
        if not model.exists():
            subprocess.run([sys.executable, EXAMPLE / "model.py", model], check=True)
        shutil.copytree(EXAMPLE, folder / "capitals", ignore=shutil.ignore_patterns("model"))
        os.chdir(folder / "capitals")
        print(f"SmolLM2-135M-Instruct in float32, examples/capitals; {describe()}, one thread")
        loading(model)  # imports what any load needs
        meters = {name: train(name, model, given.iterations) for name in SETTINGS}
        for name, meter in meters.items():
            print_parts(name, meter)
        print_opening(meters["full"], model)
        print(f"peak memory with all weights trained: {meters['full'].peak_kib / 2**20:.1f} GiB")
        os.chdir("/")


def train(name: str, model: Path, iterations: int) -> Meter:
    """Train a run of that name in this process, from nothing."""
    settings = [f"run={name}", f"model={model}", f"iterations={iterations}", "evaluate=null", *SETTINGS[name]]
    settings.append("generate.engine=transformers")
    arguments = ["grpo", "run", *(part for setting in settings for part in ("--set", setting))]
    meter = Meter()
    with meter.running(), patch.object(sys, "argv", arguments), suppress(SystemExit):
        cli.main()
    if len(meter.iterations()) != iterations:
        sys.exit(f"{name}: {len(meter.iterations())} of {iterations} iterations; see above")
    return meter


def print_parts(name: str, meter: Meter) -> None:
    """The mean iteration by part, what of it is no work, and what was written."""
    every = meter.iterations()
    counted = range(WARM, len(every))
    taken = every[WARM:]
    cpu, wall = mean(t.cpu for t in taken), mean(t.wall for t in taken)
    kinds = dict.fromkeys((stage, part) for number, stage, part in meter.parts if number in counted)
    rows = [(*kind, mean(meter.parts.get((n, *kind), 0.0) for n in counted)) for kind in kinds]
    rows += [("", "between", cpu - sum(row[2] for row in rows))]
    print(f"\n{name}: means of iterations {WARM} to {len(every) - 1}")
    print(f"{'stage':<10} {'part':<13} {'cpu s':>7} {'share':>7}")
    for stage, part, seconds in rows:
        mark = " work" if part in WORK else ""
        print(f"{stage:<10} {part:<13} {seconds:>7.3f} {seconds / cpu:>7.1%}{mark}")
    others = sum(seconds for _, part, seconds in rows if part not in WORK)
    print(f"{'all':<24} {cpu:>7.3f}         {wall:.1f} s of wall")
    print(f"neither sampling nor forward, backward, optimiser: {others / cpu:.1%}")
    each = [moment.written / 1e6 for moment in every]
    print(f"MB to disk, by iteration: {' '.join(f'{size:,.1f}' for size in each)}")
    last = meter.ends[-1].since(meter.ends[-2])
    print(f"median {median(each):,.1f} MB; after the last iteration {last.written / 1e6:,.1f} MB")


def print_opening(meter: Meter, model: Path) -> None:
    """Processor seconds until an engine has shown that it follows new weights, against one load."""
    check = measure(Reader(load_model(model, "cpu")), [[*range(1000, 1000 + LENGTH)]])
    pairs = [(loading(model), opening(model, check)) for _ in range(OPENINGS)]
    load, opened = (median(column) for column in zip(*pairs, strict=True))
    ratio = opened / load
    print(f"\nopening an engine: {opened:.2f} cpu s, loading the model: {load:.2f}; ratio {ratio:.2f}")
    print(f"each: {', '.join(f'{second:.2f}/{first:.2f}' for first, second in pairs)}")
    parts = {
        part: seconds
        for (number, stage, part), seconds in meter.parts.items()
        if (number, stage) == (0, "generate")
    }
    bring = f"then policy 0 is brought: {parts['load']:.2f}"
    print(f"in the run: {parts['open']:.2f}; {bring}")


def loading(model: Path) -> float:
    """Processor seconds of a load."""
    started = time.process_time()
    load_model(model, "cpu")
    return time.process_time() - started


def opening(model: Path, check: WeightCheck) -> float:
    """Processor seconds of opening the built-in engine, which loads the model too."""
    started = time.process_time()
    WeightSync(TransformersEngine("cpu", max_rows_per_batch=64), print).open(model, check)
    return time.process_time() - started


if __name__ == "__main__":
    main()
