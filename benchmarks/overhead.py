"""What an iteration of the quickstart costs beside its work, by stage and part.

Runs the shipped pipeline.yaml in an empty folder, without `evaluate`. Work is sampling, scoring, forward and
backward passes and the optimiser; all else is pipeline. `commit` is what a stage takes beside its timed
parts: its plan, staging, sidecars, manifest and renames; `between` is what `grpo run` does between stages.
Last, the advantage stage beside numpy: the same verified files read, the same numbers, one Parquet file made.

Run: python benchmarks/overhead.py [ITERATIONS]       result: benchmarks/overhead.txt
"""

import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
from machine import describe

from grpo import cli, tables
from grpo.advantage.stage import open_resource
from grpo.artifacts import ActiveRun, Manifest, Run, Staging
from grpo.artifacts.manifest import Plan
from grpo.config import load
from grpo.console import Console
from grpo.pipeline import lane
from grpo.pipeline import stages as pipeline

ROOT = Path(__file__).parents[1]
WORK = {"sample", "tail", "exact_answer", "train", "reference"}
WARM = 5  # iterations that are not counted
REPEATS = 15
Clocks = dict[str, list[tuple[float, float]]]  # of each stage: (start, end) of each iteration


def main() -> None:
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "pipeline.yaml", folder)
        os.chdir(folder)
        clocks, syncs = _train(iterations)
        run = ActiveRun(Path("artifacts"), load(Path("pipeline.yaml")), Path(), Console(quiet=True))
        print(f"quickstart, iterations {WARM} to {iterations - 1}; {describe()}")
        _print_parts(run, clocks, iterations)
        print(
            f"of all this, {len(syncs) / iterations:.0f} fsyncs take {sum(syncs) / iterations * 1e3:.1f} ms"
        )
        _print_advantage(run, iterations - 1)
        os.chdir(ROOT)


def _train(iterations: int) -> tuple[Clocks, list[float]]:
    """Train in this process: when each stage began and ended, and what each fsync took."""
    clocks: Clocks = defaultdict(list)
    syncs: list[float] = []
    perform, fsync = pipeline.perform, os.fsync

    def timed(run: ActiveRun, stage: pipeline.Stage, *others: Any) -> Manifest:
        started = time.perf_counter()
        manifest = perform(run, stage, *others)
        clocks[stage.name].append((started, time.perf_counter()))
        return manifest

    def timed_fsync(descriptor: int) -> None:
        started = time.perf_counter()
        fsync(descriptor)
        syncs.append(time.perf_counter() - started)

    arguments = ["grpo", "run", "--set", f"iterations={iterations}", "--set", "evaluate=null"]
    with (
        patch.object(lane, "perform", timed),
        patch.object(os, "fsync", timed_fsync),
        patch.object(sys, "argv", arguments),
        suppress(SystemExit),
    ):
        cli.main()
    return clocks, syncs


def _print_parts(run: Run, clocks: Clocks, iterations: int) -> None:
    counted = range(WARM, iterations)
    rows = []
    for stage in pipeline.STAGES:
        parts = {number: run.timings(stage.output, number) for number in counted}
        for part in dict.fromkeys(part for found in parts.values() for part in found):
            rows.append((stage.name, part, [parts[number].get(part, 0.0) for number in counted]))
        took = {number: end - start for number, (start, end) in enumerate(clocks[stage.name])}
        rows.append((stage.name, "commit", [took[n] - sum(parts[n].values()) for n in counted]))
    first, last = (clocks[stage.name] for stage in (pipeline.GENERATE, pipeline.UPDATE))
    between = [first[n][0] - last[n - 1][1] for n in counted]
    rows.append(("", "between", between))
    print(f"{'stage':<10} {'part':<13} {'median ms':>9} {'least ms':>9}")
    for stage_name, part, seconds in rows:
        mark = "work" if part in WORK else ""
        print(f"{stage_name:<10} {part:<13} {median(seconds) * 1e3:>9.1f} {min(seconds) * 1e3:>9.1f} {mark}")
    for name, is_work in (("work", True), ("pipeline", False)):
        counted_parts = [seconds for _, part, seconds in rows if (part in WORK) is is_work]
        medians, least = (sum(of(seconds) for seconds in counted_parts) for of in (median, min))
        print(f"{name:<24} {medians * 1e3:>9.1f} {least * 1e3:>9.1f}")


def _print_advantage(run: ActiveRun, iteration: int) -> None:
    """The stage, its query alone, and numpy in its place, on the tables of one iteration."""
    manifest = run.require("advantages", iteration, "")
    with open_resource(run, None) as connection:

        def stage() -> None:
            plan = Plan("advantage", 0, "advantages", iteration, {}, {}, {}, time.perf_counter())
            pipeline.make(run, pipeline.ADVANTAGE, Staging(run, plan, manifest.attempt), connection)

        stage_ms, numpy_ms = _milliseconds(stage), _milliseconds(lambda: _numpy(run, iteration))
    own, ours = _numpy(run, iteration), run.read("advantages", iteration)
    for name in ("reward", "group_mean", "advantage"):
        kept = ours["keep"].to_numpy(zero_copy_only=False)
        np.testing.assert_allclose(own[name][kept], ours[name].to_numpy()[kept], rtol=1e-9, atol=1e-12)
    print(f"advantage of {len(ours)} rollouts: stage {stage_ms:.1f} ms, committed; numpy {numpy_ms:.1f} ms")


def _milliseconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken) * 1e3


def _numpy(run: ActiveRun, iteration: int) -> dict[str, np.ndarray]:
    """The advantages of complete groups that have one reward, and their Parquet file in memory."""
    key = list(tables.KEY)
    rollouts = run.read("rollouts", iteration, [*key, "response_tokens"])
    rewards = run.read("rewards", iteration, [*key, "value", "weight"])
    order_B = np.lexsort([rewards[name].to_numpy() for name in reversed(key)])
    reward_B = (rewards["value"].to_numpy() * rewards["weight"].to_numpy())[order_B]
    groups_GK = reward_B.reshape(-1, run.config.generate.samples_per_prompt)
    mean_G1 = groups_GK.mean(axis=1, keepdims=True)
    deviation_G1 = groups_GK.std(axis=1, ddof=1, keepdims=True)
    advantage_GK = (groups_GK - mean_G1) / (deviation_G1 + run.config.advantage.epsilon)
    found = {
        "reward": reward_B,
        "group_mean": np.broadcast_to(mean_G1, groups_GK.shape).ravel(),
        "advantage": advantage_GK.ravel(),
    }
    keys = {name: rollouts[name] for name in key}
    tables.encode(pa.table({**keys, **{name: pa.array(column) for name, column in found.items()}}))
    return found


if __name__ == "__main__":
    main()
