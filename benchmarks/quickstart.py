"""The quickstart from nothing to learned: seconds, accuracy, and what an iteration costs beside its work.

Runs the shipped pipeline.yaml in an empty folder, as `grpo run` does. Work is sampling, scoring, forward and
backward passes and the optimiser; everything else (reading, hashing, SQL, Parquet, fsync, loading weights)
is what the pipeline costs.

Run: python benchmarks/quickstart.py [PICTURE.png]       result: benchmarks/quickstart.txt
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from machine import describe

ROOT = Path(__file__).parents[1]
WORK = {"sample", "exact_answer", "train", "reference", "recompute"}
CURVE = """
select iteration, avg(reward) as reward, avg(mismatch) as mismatch, avg(response_tokens) as length
from samples group by iteration order by iteration
"""
KL = "select iteration, kl from updates order by iteration"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "pipeline.yaml", folder)
        started = time.perf_counter()
        moments, last = _run(Path(folder))
        seconds = time.perf_counter() - started
        parts = _query(Path(folder), "select stage, part, seconds from timings where iteration is not null")
        if len(sys.argv) > 1:
            _draw(_query(Path(folder), CURVE), _query(Path(folder), KL), Path(sys.argv[1]))
    print(f"quickstart; {describe()}")
    print(f"preparation and training: {seconds:.1f} s; {last}")
    wall = (moments[-1] - moments[0]) / (len(moments) - 1)
    num_iterations = len(moments)
    work = sum(row["seconds"] for row in parts if row["part"] in WORK) / num_iterations
    print(
        f"per iteration: {wall:.3f} s, of it {work:.3f} s work and {wall - work:.3f} s pipeline"
        f" (ratio pipeline / work {(wall - work) / work:.2f})"
    )
    print(f"{'stage':<10} {'part':<14} {'median s':>9} {'total s':>9}")
    for stage, part in dict.fromkeys((row["stage"], row["part"]) for row in parts):
        found = [row["seconds"] for row in parts if (row["stage"], row["part"]) == (stage, part)]
        print(f"{stage:<10} {part:<14} {statistics.median(found):>9.4f} {sum(found):>9.2f}")


def _run(folder: Path) -> tuple[list[float], str]:
    """When each iteration was reported, and the last line."""
    command = [sys.executable, "-c", "from grpo.cli import main; main()", "run"]
    moments, line = [], ""
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("iteration"):
                moments.append(time.perf_counter())
    if process.returncode:
        sys.exit(f"grpo run failed: {line}")
    return moments, line.strip()


def _query(folder: Path, query: str) -> list[dict[str, Any]]:
    out = folder / "out.parquet"
    code = "from grpo.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "sql", query, "--out", out], cwd=folder, check=True)
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def _draw(curve: list[dict[str, Any]], kl: list[dict[str, Any]], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    series = [
        ("mean reward", curve, "reward"),
        ("KL to the reference", kl, "kl"),
        ("response tokens", curve, "length"),
    ]
    for axis, (title, rows, name) in zip(axes, series, strict=True):
        axis.plot(
            [row["iteration"] for row in rows], [row[name] for row in rows], color="#1f4e79", linewidth=1.8
        )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.02)
    figure.savefig(picture, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
