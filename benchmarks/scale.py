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
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

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


class Seconds(NamedTuple):
    """Of `generate`, and from the end of an update to that of the next."""

    generate: float
    iteration: float


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
            found = _measured(start, {way: [*size, *more] for way, more in ways.items()})
            title = f"{NUM_ROLLOUTS} rollouts in {shards} shards"
            print(f"\n{title:<30} {'generate':>9} {'rollouts/s':>11} {'iteration':>10}  to 2 processes")
            for way, (generate, iteration) in found.items():
                rate, ratio = NUM_ROLLOUTS / generate, iteration / found["2 processes"].iteration
                print(f"  {way:<28} {generate:9.3f} {rate:11,.0f} {iteration:10.3f} {ratio:15.2f}")
        lag = ["generate.policy_lag=1", "generate.prompts_per_iteration=64", "generate.rollouts_per_shard=64"]
        ways = {"in turn": [], "in lanes, 1 process": [ONE]}
        found = _measured(start, {way: [*lag, *more] for way, more in ways.items()})
        print(f"\n{'with policy_lag: 1':<30} {'iteration':>9} {'to in turn':>11}")
        for way, (_, iteration) in found.items():
            print(f"  {way:<28} {iteration:9.3f} {iteration / found['in turn'].iteration:11.2f}")


def _measured(start: Path, ways: dict[str, list[str]]) -> dict[str, Seconds]:
    """Medians of each way; the ways take turns."""
    generate: dict[str, list[float]] = {way: [] for way in ways}
    iteration: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(NUM_RUNS):
        for way, settings in ways.items():
            run = f"{way.replace(' ', '-').replace(',', '')}-{number}"
            _run(start, f"run={run}", *COMMON, *settings)
            rows = answer(start, "sql", STAGES, "--run", run)
            generate[way] += [
                row["ended"] - row["began"] for row in rows if row["stage"] == "generate" and row["iteration"]
            ]
            ends = [row["ended"] for row in rows if row["stage"] == "update"]
            iteration[way] += [after - before for before, after in pairwise(ends)][1:]
            shutil.rmtree(start / "artifacts" / run)
    return {way: Seconds(*map(statistics.median, (generate[way], iteration[way]))) for way in ways}


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
