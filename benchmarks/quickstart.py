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

from curves import draw
from machine import describe
from process import GRPO, answer

ROOT = Path(__file__).parents[1]
PARTS = "select stage, part, seconds from timings where iteration is not null"
WORK = {"sample", "tail", "exact_answer", "train", "reference", "recompute"}
DRAWN = ("Reward", "KL to the reference", "Response length")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "pipeline.yaml", folder)
        started = time.perf_counter()
        moments, last = _run(Path(folder))
        seconds = time.perf_counter() - started
        parts = answer(Path(folder), "sql", PARTS)
        if len(sys.argv) > 1:
            draw(Path(folder), Path(folder) / "pipeline.yaml", Path(sys.argv[1]), DRAWN)
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
    moments, line = [], ""
    with subprocess.Popen([*GRPO, "run"], cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("iteration"):
                moments.append(time.perf_counter())
    if process.returncode:
        sys.exit(f"grpo run failed: {line}")
    return moments, line.strip()


if __name__ == "__main__":
    main()
