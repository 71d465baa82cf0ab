"""update.weights: bfloat16_master on the quickstart beside float32 and autocast: first steps, and learning.

In the first iteration all three have the same policy and the same rollouts, so its steps tell rounding apart;
then each goes its own way, and held-out pass@1 says whether it learns as much. Four optimiser steps an
iteration; everything that CASES and SHARED do not set is pipeline.yaml's.

Run: python benchmarks/bfloat16_master.py FOLDER      result: benchmarks/bfloat16_master.txt
FOLDER keeps the runs: what is complete there is not run again, and an interrupted run goes on.
"""

import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe

import grpo

HERE = Path(__file__).parent
SEEDS = range(8)
ITERATIONS, EVERY = 24, 6
T_8 = 2.365  # 97.5 % of Student's distribution with 7 degrees of freedom
SHARED: dict[str, Any] = {
    "iterations": ITERATIONS,
    "generate.engine": "transformers",
    "update.steps_per_iteration": 4,
    "update.learning_rate": 1e-4,
    "evaluate.every": EVERY,
    "evaluate.samples_per_prompt": 8,
    "evaluate.temperature": 1.0,
    "checkpoints.keep_last": 2,
    "checkpoints.keep_every": None,
}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast": {"update.precision": "bfloat16"},
    "bfloat16_master": {"update.precision": "bfloat16", "update.weights": "bfloat16_master"},
}


@dataclass(frozen=True)
class Found:
    """Of one run: `updates` of its first iteration, mean mismatch of all, pass@1 of policies 0, EVERY, ..."""

    first: list[dict[str, Any]]
    mismatch: float
    curve: list[float]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    found = {case: [measured(case, seed) for seed in SEEDS] for case in CASES}
    lines = table(found)
    (HERE / "bfloat16_master.txt").write_text("\n".join([*lines, ""]))
    print(*lines, sep="\n")


def measured(case: str, seed: int) -> Found:
    """One run in the present folder, trained as far as it is not there yet."""
    own = {"run": f"{case}-{seed}", "seed": seed}
    run = grpo.run(HERE.parent / "pipeline.yaml", overrides=SHARED | own | CASES[case], quiet=True)
    evals, updates = run.table("evals").rows(), run.table("updates").rows()
    first = [row for row in updates if row["iteration"] == 0]
    mismatch = [row["mismatch_mean"] for row in updates if row["mismatch_mean"] is not None]
    return Found(first, statistics.fmean(mismatch), [row["pass_at"][1] for row in evals])


def table(found: dict[str, list[Found]]) -> list[str]:
    """The first iteration's steps against float32's, then the curves; means over the seeds."""
    lines = [
        f"quickstart, {ITERATIONS} iterations of {SHARED['update.steps_per_iteration']} steps,"
        f" {len(SEEDS)} seeds; {describe()}",
        "",
        "four steps on the same rollouts: mean |difference| to float32's",
        f"{'':<16} {'loss':>9} {'entropy':>9} {'kl':>9} {'grad_norm':>10}   grad_norm of it is relative",
    ]
    for case in list(CASES)[1:]:
        values = [_apart(found[case], found["float32"], name) for name in ("loss", "entropy", "kl")]
        norm = _apart(found[case], found["float32"], "grad_norm", relative=True)
        lines.append(f"{case:<16}" + "".join(f" {value:>9.1e}" for value in values) + f" {norm:>10.2%}")
    policies = range(0, ITERATIONS + 1, EVERY)
    lines += [
        "",
        "pass@1 on held-out sums, by policy; at the end the difference to float32 of the same seed (95 %)",
    ]
    lines.append(
        f"{'':<16}" + "".join(f" {policy:>6}" for policy in policies) + "  lowest  mismatch   difference"
    )
    for case, runs in found.items():
        curve = [statistics.fmean(values) for values in zip(*(run.curve for run in runs), strict=True)]
        lowest = min(run.curve[-1] for run in runs)
        mismatch = statistics.fmean(run.mismatch for run in runs)
        cells = "".join(f" {value:>6.3f}" for value in curve)
        lines.append(
            f"{case:<16}{cells}  {lowest:>6.3f}  {mismatch:>8.1e}   {_difference(runs, found['float32'])}"
        )
    return lines


def _apart(runs: list[Found], exact: list[Found], name: str, *, relative: bool = False) -> float:
    """Mean |difference| of a column of `updates` over seeds and steps."""
    pairs = [
        (one[name], other[name])
        for run, right in zip(runs, exact, strict=True)
        for one, other in zip(run.first, right.first, strict=True)
    ]
    return statistics.fmean(abs(one - other) / (abs(other) if relative else 1) for one, other in pairs)


def _difference(runs: list[Found], exact: list[Found]) -> str:
    """Mean over the seeds of the last pass@1's difference, and its interval."""
    if runs is exact:
        return ""
    values = [run.curve[-1] - right.curve[-1] for run, right in zip(runs, exact, strict=True)]
    half = T_8 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+.3f} +- {half:.3f}"


if __name__ == "__main__":
    main()
