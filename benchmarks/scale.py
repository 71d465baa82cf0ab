"""Engines in other processes: what they cost, and what sampling ahead gains beside training.

The quickstart's model and prompts, so that what is handed out weighs as much as it ever will: a shard takes
some milliseconds here, at real sizes minutes. All ways take turns; each engine, and the learner, computes on
one thread. Seconds are those behind the first iteration, in which engines open: medians over iterations of
three runs each.

Run: python benchmarks/scale.py      needs: pip install 'grpo-stages[ray]'
"""

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import describe
from process import GRPO, answer

ROOT = Path(__file__).parents[1]
NUM_RUNS, NUM_ITERATIONS = 3, 6
COMMON = [f"iterations={NUM_ITERATIONS}", "evaluate=null", "generate.engine=transformers"]
ENGINES = "execution={{backend: {}, engines: {{count: {}}}}}"
ONE, TWO, RAY = (ENGINES.format(*each) for each in (("local", 1), ("local", 2), ("ray, address: local", 2)))
SIZE = ["generate.prompts_per_iteration=80", "generate.samples_per_prompt=10"]
NUM_ROLLOUTS = 800
STAGES = """
select iteration, stage, min(started) as began, max(ended) as ended
from timings where iteration is not null group by all order by ended
"""
Rows = list[dict[str, Any]]


def main() -> None:
    print(f"scale; {describe()}; ray {version('ray')}")
    with tempfile.TemporaryDirectory() as name:
        start = Path(name) / "start"
        start.mkdir()
        shutil.copy(ROOT / "pipeline.yaml", start)
        _run(start, "iterations=1", "evaluate=null")  # the starter model is trained once
        for shards in (8, 80):
            size = [*SIZE, f"generate.rollouts_per_shard={NUM_ROLLOUTS // shards}"]
            ways = {"this process": [], "1 process": [ONE], "2 processes": [TWO], "2 Ray actors": [RAY]}
            found = _measured(start, {way: [*size, *more] for way, more in ways.items()}, _generate)
            title = f"generate, {NUM_ROLLOUTS} rollouts in {shards} shards"
            print(f"\n{title:<44} {'seconds':>9} {'rollouts/s':>11}  to 2 processes")
            for way, seconds in found.items():
                rate, ratio = NUM_ROLLOUTS / seconds, seconds / found["2 processes"]
                print(f"  {way:<42} {seconds:9.3f} {rate:11,.0f} {ratio:15.2f}")
        lag = ["generate.policy_lag=1", "generate.prompts_per_iteration=64", "generate.rollouts_per_shard=64"]
        ways = {"in turn": [], "in lanes, 1 process": [ONE]}
        found = _measured(start, {way: [*lag, *more] for way, more in ways.items()}, _iteration)
        print(f"\n{'an iteration with policy_lag: 1':<44} {'seconds':>9} {'to in turn':>11}")
        for way, seconds in found.items():
            print(f"  {way:<42} {seconds:9.3f} {seconds / found['in turn']:11.2f}")


def _measured(
    start: Path, ways: dict[str, list[str]], seconds_of: Callable[[Rows], list[float]]
) -> dict[str, float]:
    """Median seconds of each way; the ways take turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(NUM_RUNS):
        for way, settings in ways.items():
            run = f"run={way.replace(' ', '-').replace(',', '')}-{number}"
            _run(start, run, *COMMON, *settings)
            found[way] += seconds_of(answer(start, "sql", STAGES, "--run", run.removeprefix("run=")))
            shutil.rmtree(start / "artifacts" / run.removeprefix("run="))
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def _generate(rows: Rows) -> list[float]:
    """Of `generate`, but in the first iteration."""
    return [row["ended"] - row["began"] for row in rows if row["stage"] == "generate" and row["iteration"]]


def _iteration(rows: Rows) -> list[float]:
    """From the end of an update to that of the next, but for the first ones."""
    ends = [row["ended"] for row in rows if row["stage"] == "update"]
    return [after - before for before, after in pairwise(ends)][1:]


def _run(folder: Path, *settings: str) -> None:
    command = [*GRPO, "run", *(part for setting in settings for part in ("--set", setting))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
