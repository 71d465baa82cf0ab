"""examples/capitals from start to learned: reward, pass rates of held-out questions.

Run: python benchmarks/capitals.py MODEL_DIR [PICTURE.png]       result: benchmarks/capitals.txt
MODEL_DIR: SmolLM2-135M-Instruct, as examples/capitals/model.py writes it
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from curves import draw
from machine import describe
from process import GRPO

EXAMPLE = Path(__file__).parents[1] / "examples" / "capitals"
DRAWN = ("Reward", "Held-out pass@k: names_city", "Response length")
QUERIES = (
    "select iteration, reward, entropy, response_tokens, truncated, groups_without_signal"
    " from iterations order by iteration",
    "select iteration as policy, pass_at[1] as pass_1, pass_at_low[1] as low, pass_at_high[1] as high,"
    " pass_at[4] as pass_4, response_tokens from evals order by iteration",
    "select iteration as policy, prompt_id, response from eval_rollouts where sample_id = 0"
    " and prompt_id in (7, 16, 19) and iteration in (0, 12) order by prompt_id, iteration",
)


def main() -> None:
    model, *pictures = map(Path, sys.argv[1:])
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configuration = folder / "capitals" / "pipeline.yaml"
        shutil.copytree(EXAMPLE, configuration.parent, ignore=shutil.ignore_patterns("model"))
        (configuration.parent / "model").symlink_to(model.absolute())
        grpo(folder, "run", "-c", str(configuration))
        cpu = os.times()
        print(f"examples/capitals; {describe()}, one thread", flush=True)
        print(f"{cpu.children_user + cpu.children_system:.0f} processor seconds", flush=True)
        for query in QUERIES:
            grpo(folder, "sql", "-c", str(configuration), query)
        for picture in pictures:
            draw(folder, configuration, picture, DRAWN)


def grpo(folder: Path, *arguments: str) -> None:
    subprocess.run([*GRPO, *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
