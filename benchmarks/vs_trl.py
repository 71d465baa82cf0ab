"""A whole GRPO iteration against that of TRL's GRPOTrainer, side by side in one run.

Same model, prompts, K, lengths, precision, learning rate and number of steps. TRL has a virtual environment
of its own, with our torch and transformers, so that these do not differ:

    python3 -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.19.0
    python benchmarks/vs_trl.py --trl-python /tmp/trl/bin/python        result: benchmarks/vs_trl.txt

Each round runs `grpo run`, TRL tuned, and TRL as it comes, each as a process of its own and alone, with the
same number of threads; the order turns round with every round. Each does one step more than is measured: the
first is left out. A number is the median over a run's steps, then over the rounds; a ratio is the median of
the rounds' ratios.

TRL tuned: no gradient checkpointing, the KL without TRL's correction, loss_type grpo, and the whole step as
one batch. TRL as it comes: its own values of these, and of the batch (8 sequences, accumulated to the same
step). Both: the KL to the reference at 0.01, float32, fused AdamW, nothing saved on disk. Ours has everything
on disk when an iteration ends: rollouts, rewards, advantages, log-probs, weights and optimiser state.

Both sample for themselves, so the number of tokens differs a little. That they compute the same is shown on
the same tokens: TRL is given the rollouts that a run of ours stored, with two optimiser steps on each, so
that policy, old policy and reference all differ, and with a learning rate at which that shows.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import vs_trl_ours
from machine import describe
from vs_trl_cases import CASES, LEARNING_RATE, Case, K, write_case

PHASES = ("generate", "reference", "update", "rest", "whole")
SIDES = {"grpo": "grpo run", "tuned": "TRL tuned", "defaults": "TRL as it comes"}
KL_COEFFICIENT = 0.01
AGREEMENT_LEARNING_RATE = 1e-4
AGREEMENT_STEPS = 4
# Of the loss itself, and as a share of the gradient's norm: float32, added up in another order.
MAX_LOSS_DIFFERENCE = 1e-5
MAX_NORM_DIFFERENCE = 1e-4
TRAINER = Path(__file__).with_name("vs_trl_trainer.py")
Row = dict[str, Any]


def main() -> None:
    options = parse()
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    environment |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bench = Bench(Path(name), options.trl_python, environment)
        print(f"{describe()}, OMP_NUM_THREADS {options.threads}, float32")
        for case in CASES:
            if case.name in options.case:
                write_case(bench.place(case), case)
                compare_speed(bench, case, options.rounds, options.steps)
                compare_numbers(bench, case)
        print(f"\nhere: torch {torch.__version__}, transformers {transformers.__version__}")
        print("there: " + ", ".join(f"{name} {version}" for name, version in bench.versions.items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trl-python", type=Path, required=True, help="python of TRL's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured in each run, after a first")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides")
    parser.add_argument("--case", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--folder", type=Path, help="where runs are written, on the disk to measure with")
    return parser.parse_args()


class Bench:
    """Runs a side as a process of its own. `versions` are those that TRL's last run reported."""

    def __init__(self, folder: Path, trl_python: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.trl_python = trl_python.absolute()  # not resolved: a link is how an environment knows itself
        self.environment = environment
        self.versions: dict[str, str] = {}
        self._runs = 0

    def place(self, case: Case) -> Path:
        folder = self.folder / case.name
        folder.mkdir(exist_ok=True)
        return folder

    def job(self, case: Case, variant: str, seed: int, steps: int, **changes: Any) -> Row:
        self._runs += 1
        folder = self.place(case) / f"run{self._runs}"
        folder.mkdir()
        return {
            "variant": variant,
            "folder": str(folder),
            "model": str(self.place(case) / "model"),
            "prompts": str(self.place(case) / "prompts.jsonl"),
            "num_prompts": case.num_prompts,
            "k": K,
            "max_new_tokens": case.max_new_tokens,
            "learning_rate": LEARNING_RATE,
            "kl_coefficient": KL_COEFFICIENT,
            "seed": seed,
            "steps": steps,
            "steps_per_rollouts": 1,
            "rollouts": None,
            **changes,
        }

    def ours(self, case: Case, job: Row) -> list[Row]:
        return vs_trl_ours.run(Path(job["folder"]), case, {**job, "environment": self.environment})

    def theirs(self, job: Row) -> list[Row]:
        folder = Path(job["folder"])
        job_path, result_path = folder / "job.json", folder / "result.json"
        job_path.write_text(json.dumps(job))
        command = [str(self.trl_python), str(TRAINER), str(job_path), str(result_path)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
        result = json.loads(result_path.read_text())
        self.versions = result["versions"]
        rows: list[Row] = result["steps"]
        return rows


def compare_speed(bench: Bench, case: Case, rounds: int, steps: int) -> None:
    measured: dict[str, list[Row]] = {side: [] for side in SIDES}
    started, others_before = time.perf_counter(), others_seconds()
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            job = bench.job(case, side, seed=number, steps=steps + 1)
            rows = bench.ours(case, job) if side == "grpo" else bench.theirs(job)
            measured[side].append(median_step(rows[1:]))
            shutil.rmtree(job["folder"])
    available = (time.perf_counter() - started) * (os.cpu_count() or 1)
    busy = (others_seconds() - others_before) / available
    print(f"\n{case.title}\nmedians of {rounds} rounds of {steps} steps, seconds per step", end="")
    print(f" (other processes took {busy:.0%} of the machine)")
    print(f"{'':<24}" + "".join(f"{name:>11}" for name in (*PHASES, "tokens", "tokens/s")))
    names = (*PHASES, "tokens", "tokens_per_s")
    for side, title in SIDES.items():
        values = {name: statistics.median(row[name] for row in measured[side]) for name in names}
        cells = "".join(f"{values[phase]:>11.2f}" for phase in PHASES)
        wholes = [row["whole"] for row in measured[side]]
        spread = f"   whole {min(wholes):.2f} to {max(wholes):.2f}"
        print(f"{title:<24}{cells}{values['tokens']:>11,.0f}{values['tokens_per_s']:>11,.0f}{spread}")
    for side in ("tuned", "defaults"):
        print_ratios(f"{SIDES[side]} / grpo", measured[side], measured["grpo"])
    for side, title in SIDES.items():
        values = {name: statistics.median(row[name] for row in measured[side]) for name in measured[side][0]}
        print(
            f"{title:<24}  reward {values['reward']:.3f}  kl {values['kl']:.1e}  loss {values['loss']:+.1e}"
            f"  entropy {values['entropy']:.4f}  grad norm {values['grad_norm']:.3f}"
            f"  length {values['shortest']:.0f}-{values['longest']:.0f}, mean {values['mean_length']:.1f}",
            flush=True,
        )


def others_seconds() -> float:
    """Processor time of all processes but this one and its children that have ended; Linux only."""
    user, nice, system, _idle, _wait, *interrupts = Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    ticks = sum(map(int, (user, nice, system, *interrupts)))
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def print_ratios(title: str, theirs: list[Row], ours: list[Row]) -> None:
    """How many times as long TRL takes, by phase; of tokens/s, how many times as many are ours."""

    def ratio(name: str) -> float:
        return float(statistics.median(a[name] / b[name] for a, b in zip(theirs, ours, strict=True)))

    cells = "".join(f"{ratio(phase):>11.2f}" if phase != "rest" else f"{'':>11}" for phase in PHASES)
    print(f"{title:<24}{cells}{ratio('tokens'):>11.2f}{1 / ratio('tokens_per_s'):>11.2f}")


def median_step(rows: list[Row]) -> Row:
    """Median over the steps of each number, and what follows from it."""
    for row in rows:
        parts = [row[phase] for phase in ("generate", "reference", "update")]
        lengths = row.pop("lengths")
        row["rest"] = row["whole"] - sum(parts)
        row["tokens"] = sum(lengths)
        row["tokens_per_s"] = sum(lengths) / row["whole"]
        row |= {"shortest": min(lengths), "longest": max(lengths), "mean_length": statistics.mean(lengths)}
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def compare_numbers(bench: Bench, case: Case) -> None:
    """Loss and gradient of each optimiser step of both, on the same rollouts."""
    settings = {"learning_rate": AGREEMENT_LEARNING_RATE, "steps_per_rollouts": 2}
    job = bench.job(case, "grpo", seed=0, steps=AGREEMENT_STEPS, **settings)
    folder = Path(job["folder"])
    bench.ours(case, job)
    ours, rollouts = vs_trl_ours.steps(folder), vs_trl_ours.stored_rollouts(folder)
    theirs = bench.theirs(
        bench.job(case, "tuned", seed=0, steps=AGREEMENT_STEPS, rollouts=rollouts, **settings)
    )
    print(f"the same rollouts, two steps on each, learning rate {AGREEMENT_LEARNING_RATE}")
    print(f"{'step':<6}{'loss':>14}{'TRL':>14}{'grad norm':>14}{'TRL':>14}{'entropy':>14}{'TRL':>14}")
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        print(
            f"{number:<6}{our['loss']:>14.7f}{their['loss']:>14.7f}{our['grad_norm']:>14.6f}"
            f"{their['grad_norm']:>14.6f}{our['entropy']:>14.6f}{their['entropy']:>14.6f}"
        )
    pairs = list(zip(ours, theirs, strict=True))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs)
    print(f"largest difference: loss {loss:.1e}, grad norm {norm:.1e} of it", flush=True)
    if not (loss < MAX_LOSS_DIFFERENCE and norm < MAX_NORM_DIFFERENCE):
        raise SystemExit("the two do not compute the same: what they take for it is no comparison")


if __name__ == "__main__":
    main()
