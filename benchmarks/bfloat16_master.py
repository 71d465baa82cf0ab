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
CLIPPED = ("clip_fraction_low", "clip_fraction_high")
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


Pair = tuple[dict[str, Any], dict[str, Any]]


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
    (HERE / "bfloat16_master.txt").write_text("\n".join([*map(str.rstrip, lines), ""]))
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
        "first iteration, the same rollouts: mean |difference| to float32's, of its steps that clip as many",
        "tokens as that; where it clips others, the gradient is another (grad_norm: relative)",
        f"{'':<16} {'steps':>8} {'loss':>9} {'entropy':>9} {'grad_norm':>10}   {'of all':>6}",
    ]
    for case in list(CASES)[1:]:
        every = _pairs(found[case], found["float32"])
        alike = [pair for pair in every if all(pair[0][name] == pair[1][name] for name in CLIPPED)]
        apart = f"{_apart(alike, 'loss'):>9.1e} {_apart(alike, 'entropy'):>9.1e}"
        norm, of_all = (_apart(pairs, "grad_norm", relative=True) for pairs in (alike, every))
        lines.append(f"{case:<16} {f'{len(alike)}/{len(every)}':>8} {apart} {norm:>10.2%}   {of_all:>6.2%}")
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


def _pairs(runs: list[Found], exact: list[Found]) -> list[Pair]:
    """Rows of `updates` of the same seed and step."""
    both = zip(runs, exact, strict=True)
    return [pair for run, right in both for pair in zip(run.first, right.first, strict=True)]


def _apart(pairs: list[Pair], name: str, *, relative: bool = False) -> float:
    """Mean |difference| of a column."""
    values = ((one[name], other[name]) for one, other in pairs)
    return statistics.fmean(abs(one - other) / (abs(other) if relative else 1) for one, other in values)


def _difference(runs: list[Found], exact: list[Found]) -> str:
    """Mean over the seeds of the last pass@1's difference, and its interval."""
    if runs is exact:
        return ""
    values = [run.curve[-1] - right.curve[-1] for run, right in zip(runs, exact, strict=True)]
    half = T_8 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+.3f} +- {half:.3f}"


if __name__ == "__main__":
    main()
