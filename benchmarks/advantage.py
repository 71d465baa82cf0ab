"""Seconds and memory of the advantage stage over 1M and 10M rollouts, everything included.

The stage as `grpo advantage` runs it: sha256 of its inputs, the query, Parquet with fsync, the commit. The
floor beside it is the same arithmetic in numpy on arrays that are in memory already.

Run: python benchmarks/advantage.py [ROLLOUTS ...]       result: benchmarks/advantage.txt
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from machine import describe

from grpo import tables
from grpo.advantage import stage
from grpo.advantage.plan import plan as planned
from grpo.artifacts import ActiveRun, Plan, Product, Staging, id_of
from grpo.config import Config
from grpo.console import Console
from grpo.pipeline.stages import ADVANTAGE, make

K = 8
SHARD_ROWS = 2**20
REPEATS = 3


def main() -> None:
    sizes = [int(argument) for argument in sys.argv[1:]] or [1_000_000, 10_000_000]
    print(f"advantage stage, one reward, K = {K}; {describe()}; median of {REPEATS}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            _write_run(Path(folder), size)
            found = [_in_process(Path(folder), attempt) for attempt in range(REPEATS)]
        seconds = statistics.median(result[0] for result in found)
        floor = statistics.median(_floor(size) for _ in range(REPEATS))
        peak = max(result[1] for result in found)
        print(
            f"{size:>12,} rollouts: {seconds:6.2f} s, peak memory {peak:.2f} GiB;"
            f" numpy in memory {floor:5.2f} s, ratio {seconds / floor:.1f}"
        )


def _in_process(folder: Path, attempt: int) -> tuple[float, float]:
    """(seconds, peak GiB) of the stage in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run_stage, (folder, attempt))


def _run_stage(folder: Path, attempt: int) -> tuple[float, float]:
    run = _run(folder)
    started = time.perf_counter()
    with stage.open_resource(run, None) as connection:
        make(run, ADVANTAGE, Staging(run, planned(run, 0), attempt), connection)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _run(folder: Path) -> ActiveRun:
    config = {
        "run": "benchmark",
        "model": "none",
        "prompts": {"source": "arithmetic"},
        "score": {"rewards": [{"function": "exact_answer"}]},
    }
    return ActiveRun(folder, Config.model_validate(config), folder, Console(quiet=True))


def _write_run(folder: Path, size: int) -> None:
    """Commit rollouts and rewards of one iteration, one-token responses, rewards 0 or 1."""
    run = _run(folder)
    generator = np.random.default_rng(0)
    for output in ("rollouts", "rewards"):
        staging = Staging(run, Plan(output, 1, output, 0, {}, {}), 0)
        records = []
        for index, start in enumerate(range(0, size, SHARD_ROWS)):
            rows = np.arange(start, min(start + SHARD_ROWS, size), dtype=np.int32)
            data = _rollouts(rows) if output == "rollouts" else _rewards(rows, generator)
            records.append(staging.write_table(output, staging.file_name("part", index), data))
        ids = (
            {"rollouts": id_of(records)} if output == "rollouts" else {"reward/exact_answer": id_of(records)}
        )
        staging.commit(Product(ids, records, {"failed": 0, "weights": {"exact_answer": 1.0}}))


def _keys(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"iteration": np.zeros_like(rows), "group_id": rows // K, "sample_id": rows % K}


def _rollouts(rows: np.ndarray) -> pa.Table:
    offsets = np.arange(len(rows) + 1, dtype=np.int32)
    columns = {
        **_keys(rows),
        "prompt_id": rows // K,
        "round": np.zeros_like(rows),
        "prompt": ["1+1="] * len(rows),
        "response": ["2"] * len(rows),
        "prompt_token_ids": pa.ListArray.from_arrays(offsets, rows),
        "response_token_ids": pa.ListArray.from_arrays(offsets, rows),
        "old_logprobs": pa.ListArray.from_arrays(offsets, rows.astype(np.float32)),
        "response_mask": pa.ListArray.from_arrays(offsets, np.ones(len(rows), dtype=bool)),
        "finish_reason": ["stop"] * len(rows),
        "response_tokens": np.ones_like(rows),
        "policy_iteration": np.zeros_like(rows),
        "temperature": np.ones(len(rows)),
        "seed": rows.astype(np.int64),
    }
    return pa.table(columns).cast(tables.schema("rollouts"))


def _rewards(rows: np.ndarray, generator: np.random.Generator) -> pa.Table:
    columns = {
        **_keys(rows),
        "name": ["exact_answer"] * len(rows),
        "value": generator.integers(0, 2, len(rows)).astype(np.float64),
        "weight": np.ones(len(rows)),
        "status": ["ok"] * len(rows),
        "error": pa.nulls(len(rows), pa.string()),
    }
    return pa.table(columns).cast(tables.schema("rewards"))


def _floor(size: int) -> float:
    rewards = np.random.default_rng(0).integers(0, 2, (size // K, K)).astype(np.float64)
    started = time.perf_counter()
    mean, deviation = rewards.mean(axis=1, keepdims=True), rewards.std(axis=1, ddof=1, keepdims=True)
    constant = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    np.where(constant, 0.0, (rewards - mean) / (deviation + 1e-4))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
