"""process: `grpo` in a process of its own, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

GRPO = [sys.executable, "-c", "from grpo.cli import main; main()"]


def answer(folder: Path, *arguments: str) -> Any:
    """What a command says with --json, of the project in `folder`."""
    command = [*GRPO, *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def train(folder: Path, *settings: str) -> dict[str, float]:
    """Train what `folder` configures, with --set; the share of right held-out sums, before and after."""
    found = answer(folder, "run", *(part for setting in settings for part in ("--set", setting)))
    first, *_, last = (row["pass_at"]["1"] for row in found["evaluations"])
    return {"before": first, "after": last}
