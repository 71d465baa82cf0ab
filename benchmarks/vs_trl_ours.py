"""Our half of vs_trl.py: `grpo run` over a pipeline.yaml of its own, and what `grpo sql` says of it then.

generate: the whole stage, its tables on disk included. reference and update: those parts of the update stage.
whole: from the end of an iteration to the end of the next, as `grpo run` reports it; so also rewards,
advantages, and every commit to disk: tables, weights and optimiser state.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vs_trl_cases import Case, K

COMMAND = Path(sys.executable).with_name("grpo")
REWARD = Path(__file__).with_name("vs_trl_reward.py")
DISK = ("load", "write")  # parts of the update stage that count as rest

STEPS = """
select iteration, step, loss, kl, grad_norm, entropy, mean_reward as reward
from updates
join (select iteration, avg(reward) as mean_reward from advantages group by iteration) using (iteration)
order by iteration, step
"""
SECONDS = "select iteration, stage, part, seconds from timings where iteration is not null"
ROLLOUTS = """
select iteration, prompt_token_ids, response_token_ids, old_logprobs
from rollouts order by iteration, group_id, sample_id
"""


def run(folder: Path, case: Case, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Train; a row for each iteration: seconds by phase, response lengths, the numbers of its last step."""
    write_configuration(folder, case, job)
    ends = train(folder, job["environment"])
    rows: list[dict[str, Any]] = []
    starts = [ends[0], *ends]  # of the first iteration nobody knows
    lengths = [[len(ids) for ids in rollouts["completion_ids"]] for rollouts in stored_rollouts(folder)]
    for iteration, end in enumerate(ends):
        rows.append({"whole": end - starts[iteration], "lengths": lengths[iteration]})
        rows[-1] |= dict.fromkeys(("generate", "reference", "update"), 0.0)
    for part in query(folder, SECONDS):
        if phase := phase_of(part["stage"], part["part"]):
            rows[part["iteration"]][phase] += part["seconds"]
    for step in steps(folder):
        rows[step["iteration"]] |= step
    return rows


def write_configuration(folder: Path, case: Case, job: dict[str, Any]) -> None:
    config = {
        "run": "grpo",
        "iterations": job["steps"] // job["steps_per_rollouts"],
        "seed": job["seed"],
        "model": job["model"],
        "prompts": {"source": job["prompts"]},
        "generate": {
            "engine": "transformers",
            "prompts_per_iteration": case.num_prompts,
            "samples_per_prompt": K,
            "max_new_tokens": case.max_new_tokens,
        },
        "score": {"rewards": [{"function": f"{REWARD.stem}:share_of_ascii"}]},
        "update": {
            "objective": "grpo",
            "kl_coefficient": job["kl_coefficient"],
            "learning_rate": job["learning_rate"],
            "epochs": job["steps_per_rollouts"],
        },
    }
    (folder / "pipeline.yaml").write_text(json.dumps(config, indent=1))  # YAML reads JSON
    (folder / REWARD.name).write_bytes(REWARD.read_bytes())


def train(folder: Path, environment: dict[str, str]) -> list[float]:
    """`grpo run`; when each iteration ended."""
    ends, said = [], []
    command = [str(COMMAND), "run", "-c", "pipeline.yaml"]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("iteration "):
                ends.append(time.perf_counter())
            said.append(line)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{''.join(said)}")
    return ends


def phase_of(stage: str, part: str) -> str | None:
    """The phase that a part of the timings counts to; None: the rest."""
    if stage == "generate":
        return "generate"
    if stage != "update" or part in DISK:
        return None
    return "reference" if part == "reference" else "update"


def steps(folder: Path) -> list[dict[str, Any]]:
    """The optimiser steps, in order."""
    return query(folder, STEPS)


def stored_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Of each iteration, its rollouts as TRL's rollout_func returns them."""
    found: dict[int, dict[str, Any]] = {}
    for row in query(folder, ROLLOUTS):
        columns = found.setdefault(row["iteration"], {"prompt_ids": [], "completion_ids": [], "logprobs": []})
        columns["prompt_ids"].append(row["prompt_token_ids"])
        columns["completion_ids"].append(row["response_token_ids"])
        columns["logprobs"].append(row["old_logprobs"])
    return [found[iteration] for iteration in sorted(found)]


def query(folder: Path, text: str) -> list[dict[str, Any]]:
    out = folder / "answer.json"
    out.unlink(missing_ok=True)
    command = [str(COMMAND), "sql", text, "-c", "pipeline.yaml", "--out", out.name]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows
