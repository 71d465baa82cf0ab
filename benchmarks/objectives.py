"""Every objective, every estimator and a teacher on the quickstart: held-out pass@1 by iteration, by seed.

Each at the same two learning rates, four optimiser steps an iteration: with one step every ratio is 1 and the
surrogates are the same. What a case sets stands in CASES; everything else is pipeline.yaml's. Estimators and
the teacher come with objective grpo.

Run: python benchmarks/objectives.py FOLDER        result: benchmarks/objectives.txt and .png
FOLDER keeps the runs. What is complete there is not run again, and an interrupted run goes on. The result is
written after each seed, from the seeds that all cases have.
"""

import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from machine import describe

import grpo
from grpo.config import AdvantageConfig, UpdateConfig

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RATES = (1e-4, 4e-4)
ITERATIONS, EVERY, EARLY = 24, 2, 6
REWARDS = [
    {"function": "exact_answer"},
    {"function": "regex_format", "weight": 0.1, "arguments": {"pattern": "[1-9][0-9]?"}},
]
SHARED: dict[str, Any] = {
    "iterations": ITERATIONS,
    "generate.engine": "transformers",
    "update.steps_per_iteration": 4,
    "evaluate.every": EVERY,
    "evaluate.samples_per_prompt": 8,
    "evaluate.temperature": 1.0,
    "checkpoints.keep_last": 2,
}
OBJECTIVES: tuple[str, ...] = get_args(UpdateConfig.model_fields["objective"].annotation)
ESTIMATORS: tuple[str, ...] = get_args(AdvantageConfig.model_fields["estimator"].annotation)
NEEDS: dict[str, dict[str, Any]] = {
    "gdpo": {"score.rewards": REWARDS},  # with one reward it is the default in another scale
    "pass_at_k": {"advantage.pass_k": 4},
}
TEACHER: dict[str, Any] = {
    "score.rewards": [{"function": "exact_answer", "weight": 0}],
    "score.teachers": [{"model": "small-arithmetic"}],
    "update.kl_coefficient": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"update.objective": name} for name in OBJECTIVES},
    **{name: {"advantage.estimator": name, **NEEDS.get(name, {})} for name in ESTIMATORS if name != "group"},
    "teacher": TEACHER,
}
COLORS = dict(zip(RATES, ("#1f4e79", "#e07b39"), strict=True))


@dataclass(frozen=True)
class Curve:
    """Pass@1 and pass@4 on the held-out sums of policies 0, EVERY, 2 EVERY, ... of one run."""

    one: list[float]
    four: list[float]


Curves = dict[tuple[str, float], list[Curve]]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    curves: Curves = {(case, rate): [] for case in CASES for rate in RATES}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=os.chdir, initargs=(folder,)) as pool:
        for seed in SEEDS:
            for (case, rate), curve in zip(curves, pool.map(measured, *_jobs(curves, seed)), strict=True):
                curves[case, rate].append(curve)
                print(f"seed {seed}  {case:<14} {rate:g}  {curve.one[-1]:.3f}", flush=True)
            lines = table(curves)
            (HERE / "objectives.txt").write_text("\n".join([*lines, ""]))
            draw(curves, HERE / "objectives.png")
    print(*lines, sep="\n")


def _jobs(curves: Curves, seed: int) -> Iterator[list[Any]]:
    """The arguments of measured(), each as a column."""
    yield from ([case for case, _ in curves], [rate for _, rate in curves], [seed] * len(curves))


def measured(case: str, rate: float, seed: int) -> Curve:
    """The curve of one run in the present folder, which is trained as far as it is not there yet."""
    torch.set_num_threads(1)
    own = {"run": f"{case}-{rate:g}-{seed}", "seed": seed, "update.learning_rate": rate}
    run = grpo.run(HERE.parent / "pipeline.yaml", overrides=SHARED | own | CASES[case], quiet=True)
    found = run.table("evals").rows()
    assert [row["iteration"] for row in found] == _policies()
    return Curve(*([row["pass_at"][k] for row in found] for k in (1, 4)))


def _policies() -> list[int]:
    return list(range(0, ITERATIONS + 1, EVERY))


def table(curves: Curves) -> list[str]:
    """Medians over the seeds, and the lowest seed at the end: a line per case."""
    num_seeds = min(len(found) for found in curves.values())
    block = f"{f'pass@1 at {EARLY}':>11} {f'at {ITERATIONS}':>6} {'lowest':>7} {'pass@4':>7}"
    lines = [
        f"quickstart, {ITERATIONS} iterations of {SHARED['update.steps_per_iteration']} steps, "
        f"{num_seeds} seeds; {describe()}",
        "held-out sums, 8 sampled responses each: medians over the seeds, and the lowest seed at the end",
        " " * 14 + "".join(f" | {f'learning rate {rate:g}':-^{len(block)}}" for rate in RATES),
        " " * 14 + f" | {block}" * len(RATES),
    ]
    for case in CASES:
        cells = (_cells(curves[case, rate][:num_seeds]) for rate in RATES)
        lines.append(f"{case:<14}" + "".join(f" | {cell}" for cell in cells))
    return lines


def _cells(found: list[Curve]) -> str:
    early = statistics.median(curve.one[EARLY // EVERY] for curve in found)
    last = [curve.one[-1] for curve in found]
    four = statistics.median(curve.four[-1] for curve in found)
    return f"{early:>11.2f} {statistics.median(last):>6.2f} {min(last):>7.2f} {four:>7.2f}"


def draw(curves: Curves, picture: Path) -> None:
    """Small multiples: mean and range of the seeds by case, and the means of grpo, dashed, in each."""
    import matplotlib.pyplot as plt

    rows, columns = -(-(len(CASES) + 1) // 5), 5  # one place is the legend's
    figure, grid = plt.subplots(
        rows, columns, figsize=(11, 2 * rows), layout="constrained", sharex=True, sharey=True
    )
    for axis, case in zip(grid.flat, CASES, strict=False):
        for rate, color in COLORS.items():
            seeds = list(zip(*(curve.one for curve in curves[case, rate]), strict=True))
            low, high = [min(values) for values in seeds], [max(values) for values in seeds]
            axis.fill_between(_policies(), low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(_policies(), _means(curves["grpo", rate]), color=color, linewidth=0.9, linestyle=":")
            axis.plot(_policies(), _means(curves[case, rate]), color=color, linewidth=1.8)
        axis.set_title(case, fontsize=10, loc="left")
        axis.set(ylim=(0, 1.02), xlim=(0, ITERATIONS))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid.flat[len(CASES) :]:
        axis.axis("off")
    _legend(grid.flat[-1], len(curves["grpo", RATES[0]]))
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("pass@1 on held-out sums", fontsize=9)
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _means(found: list[Curve]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(curve.one for curve in found), strict=True)]


def _legend(axis: Any, num_seeds: int) -> None:
    for rate, color in COLORS.items():
        axis.plot([], [], color=color, linewidth=1.8, label=f"learning rate {rate:g}")
    axis.fill_between([], [], color="#8a94a3", alpha=0.4, label=f"range of {num_seeds} seeds")
    axis.plot([], [], color="#8a94a3", linewidth=0.9, linestyle=":", label="grpo")
    axis.legend(fontsize=9, frameon=False, loc="center")


if __name__ == "__main__":
    main()
