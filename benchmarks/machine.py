"""machine: the line that names the machine a result was measured on, by cores and model only."""

import os
from pathlib import Path


def describe() -> str:
    """`2 cores, <processor model>`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    return f"{os.cpu_count()} cores, {model}"
