"""Every objective on the quickstart: 40 iterations each, from the same starting model, with the same prompts.

Only `update.objective` differs; everything else is pipeline.yaml's. AdamW does not see the scale of a loss,
so one learning rate does for all of them.

Run: python benchmarks/objectives.py        result: benchmarks/objectives.txt and .png
"""

import shutil
import tempfile
from pathlib import Path
from typing import get_args

from machine import describe
from process import answer, train

from grpo.config import UpdateConfig

HERE = Path(__file__).parent
ITERATIONS = 40
OBJECTIVES: tuple[str, ...] = get_args(UpdateConfig.model_fields["objective"].annotation)
REWARDS = "select avg(reward) as reward from samples group by iteration order by iteration"
HEADER = f"{'objective':<14} {'reward, first and last 5':>24} {'held-out sums, before and after':>32}"


def main() -> None:
    curves: dict[str, list[float]] = {}
    lines = [f"quickstart, {ITERATIONS} iterations; {describe()}", HEADER]
    for name in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            curves[name], accuracy = _run(Path(folder), name)
        first, last = (sum(part) / len(part) for part in (curves[name][:5], curves[name][-5:]))
        rewards = f"{first:.3f}  {last:.3f}"
        accuracies = f"{accuracy['before']:.2f}  {accuracy['after']:.2f}"
        lines.append(f"{name:<14} {rewards:>24} {accuracies:>32}")
        print(lines[-1], flush=True)
    (HERE / "objectives.txt").write_text("\n".join([*lines, ""]))
    _draw(curves, HERE / "objectives.png")


def _run(folder: Path, objective: str) -> tuple[list[float], dict[str, float]]:
    """Mean reward by iteration, and the accuracy on the held-out sums before and after."""
    shutil.copy(HERE.parent / "pipeline.yaml", folder)
    settings = (f"update.objective={objective}", f"iterations={ITERATIONS}", "generate.engine=transformers")
    accuracy = train(folder, *settings)
    return [row["reward"] for row in answer(folder, "sql", REWARDS)], accuracy


def _draw(curves: dict[str, list[float]], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained", sharex=True, sharey=True)
    for axis, (name, rewards) in zip(axes.flat, curves.items(), strict=True):
        for other in curves.values():
            axis.plot(other, color="#c9ced6", linewidth=0.8)
        axis.plot(rewards, color="#1f4e79", linewidth=2)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylim(0, 1.02)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("mean reward", fontsize=9)
    figure.savefig(picture, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
