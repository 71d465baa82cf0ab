"""Whose log-probs are pi_old, and does it matter? The quickstart twice, side by side.

`sampled`: update.old_logprobs=sampled, the sampler's. `corrected`: recomputed, the learner's own, with
update.sampler_correction=truncate. By vLLM in bfloat16, where sampler and learner do differ; the built-in
engine computes what the learner does, and its two curves are one.

Run: python benchmarks/sampler_correction.py        result: benchmarks/sampler_correction.txt and .png
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from machine import describe
from process import answer, train

HERE = Path(__file__).parent
RUNS = {
    "sampled": ["update.old_logprobs=sampled"],
    "corrected": ["update.old_logprobs=recomputed", "update.sampler_correction=truncate"],
}
ENGINE = ["generate.engine=vllm", "generate.engine_options.dtype=bfloat16"]
COLUMNS = {"reward": "8.4f", "kl": "8.5f", "mismatch_mean": "9.2e", "over_cap_fraction": "8.4f"}
TITLES = {"reward": "reward", "kl": "kl", "mismatch_mean": "mismatch", "over_cap_fraction": "over cap"}
CURVE = """
with rewards_of_iterations as (
    select iteration, avg(reward) as reward from samples group by iteration
)
select iteration, reward, kl, mismatch_mean, over_cap_fraction
from rewards_of_iterations join updates using (iteration)
where step = 0
order by iteration
"""
EVERY = 5  # iterations between rows of the table; the picture has all


def main() -> None:
    curves, accuracies = {}, {}
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            curves[name], accuracies[name] = _run(Path(folder), [*settings, *ENGINE])
    text = "\n".join([f"quickstart, vLLM in bfloat16; {describe()}", *_table(curves, accuracies), ""])
    (HERE / "sampler_correction.txt").write_text(text)
    print(text, end="")
    _draw(curves, HERE / "sampler_correction.png")


def _run(folder: Path, settings: list[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The curve of one run, a row per iteration, and its accuracy on the held-out sums before and after."""
    shutil.copy(HERE.parent / "pipeline.yaml", folder)
    accuracy = train(folder, *settings)
    return answer(folder, "sql", CURVE), accuracy


def _table(curves: dict[str, list[dict[str, Any]]], accuracies: dict[str, dict[str, float]]) -> list[str]:
    """Both curves side by side, every EVERY-th iteration and the last; then the held-out accuracy."""
    widths = [int(form.partition(".")[0]) for form in COLUMNS.values()]
    block = sum(widths) + 2 * (len(widths) - 1)
    titles = "  ".join(f"{TITLES[name]:>{width}}" for name, width in zip(COLUMNS, widths, strict=True))
    lines = [
        " " * 9 + "".join(f"   {name:-^{block}}" for name in curves),
        "iteration" + f"   {titles}" * len(curves),
    ]
    for rows in zip(*curves.values(), strict=True):
        iteration = rows[0]["iteration"]
        if iteration % EVERY and rows[0] is not next(iter(curves.values()))[-1]:
            continue
        cells = ["  ".join(f"{row[name]:{form}}" for name, form in COLUMNS.items()) for row in rows]
        lines.append(f"{iteration:>9}" + "".join(f"   {cell}" for cell in cells))
    lines.append("held-out sums, greedy, before and after:")
    lines += [
        f"  {name:<10} {found['before']:.2f}  {found['after']:.2f}" for name, found in accuracies.items()
    ]
    return lines


def _draw(curves: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    looks = {"sampled": ("#1f4e79", "-", 2.6), "corrected": ("#e07b39", "--", 1.5)}
    for axis, (column, title) in zip(
        axes, {"reward": "mean reward", "kl": "KL to the reference"}.items(), strict=True
    ):
        for name, rows in curves.items():
            color, style, width = looks[name]
            axis.plot(
                [row["iteration"] for row in rows],
                [row[column] for row in rows],
                color=color,
                linestyle=style,
                linewidth=width,
                label=name,
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8, loc="lower right", frameon=False)
    figure.savefig(picture, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
