"""What check.sh found, in one document: rates, memory, and how near the learner is to the sampler."""

import json
import os
from pathlib import Path
from typing import Any

from grpo.artifacts import Run

OUT = Path(os.environ["OUT"])


def main() -> None:
    flop = json.loads(Path("model.json").read_text())["flop_per_token"]
    run = Run(Path("artifacts"), "check")
    found = {number: of(run, number, flop) for number in run.iterations() if run.manifest("update", number)}
    line = {"what": "summary", "peak_device_mib": peak_device_mib(), "iterations": found}
    with (OUT / "result.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=1))


def of(run: Run, number: int, flop: int) -> dict[str, Any]:
    rollouts, update = (run.require(output, number, "") for output in ("rollouts", "update"))
    seconds = {output: run.timings(output, number) for output in ("rollouts", "update")}
    sampling = sum(seconds["rollouts"].get(part, 0.0) for part in ("sample", "tail"))
    tokens, train = rollouts.summary["response_tokens"], seconds["update"]["train"]
    return {
        "response_tokens": tokens,
        # Iterations that were resumed have sampled a part of it.
        "generate_tokens_per_s": round(tokens / sampling),
        "update_tokens_per_s": round(tokens / train),
        "update_tflops": flop * tokens / train / 1e12,
        **{name: rollouts.summary.get(name) for name in ("precision", "weight_check_difference")},
        **{name: update.summary.get(name) for name in ("mismatch_mean", "layout")},
        "execution": dict(update.execution),
        "seconds": {
            f"{output}.{part}": value
            for output, parts in seconds.items()
            for part, value in parts.items()
            if value > 0.05
        },
    }


def peak_device_mib() -> int | None:
    path = OUT / "memory.csv"
    if not path.exists():
        return None
    rows = (line.split(",") for line in path.read_text().splitlines())
    return max((int(row[1]) for row in rows if len(row) == 3), default=None)


if __name__ == "__main__":
    main()
