"""runs: a run on disk from rows written by hand, without a model: a token is a byte of the response."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo import tables
from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Plan, Product, Run, Staging, files, id_of
from grpo.config import Config
from grpo.console import Console
from grpo.models import starter_model
from grpo.pipeline.prepare import run_json

EOS = 256
Row = dict[str, Any]


def row(iteration: int, group_id: int, sample_id: int, response: str = "ab", **changes: Any) -> Row:
    """A rollout, its rewards ({name: value}), advantage and policy_logprobs; any of them changed."""
    token_ids = [*response.encode(), EOS]
    values = {
        "iteration": iteration,
        "group_id": group_id,
        "sample_id": sample_id,
        "prompt_id": group_id,
        "round": 0,
        "prompt": f"prompt {changes.get('prompt_id', group_id)}",
        "response": response,
        "prompt_token_ids": [1],
        "response_token_ids": token_ids,
        "old_logprobs": [-0.5] * len(token_ids),
        "response_mask": [True] * len(token_ids),
        "finish_reason": "stop",
        "response_tokens": len(token_ids),
        "policy_iteration": iteration,
        "temperature": 1.0,
        "seed": 0,
        "rewards": {"right": 1.0},
        "reward": 1.0,
        "group_mean": 1.0,
        "group_std": 0.0,
        "group_size": 2,
        "advantage": 0.0,
        "keep": True,
        "reason": None,
        "policy_logprobs": [-0.5] * len(token_ids),
    }
    return values | changes


def make_run(
    root: Path, rows: Iterable[Row], updates: Iterable[Row] = (), name: str = "hand", **config: Any
) -> ActiveRun:
    """The run: its tokenizer is in root/model, and `config` are keys of its configuration."""
    values = {
        "run": name,
        "model": "./model",
        "prompts": {"source": "arithmetic"},
        "score": {"rewards": [{"function": "exact_answer", "name": "right"}]},
    }
    run = ActiveRun(root / "artifacts", Config.model_validate(values | config), root, Console(quiet=True))
    files.make_folder(run.path)
    files.write_file(run.path / "run.json", run_json(run.config))
    if not (root / "model").exists():
        starter_model.build_tokenizer().save_pretrained(root / "model")
    staging = Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0)
    staging.commit(Product({"policy": "start", "reference": "start"}, [], {"policy": "model"}))
    every = sorted(rows, key=lambda each: int(each["iteration"]))
    for iteration, members in groupby(every, key=lambda each: int(each["iteration"])):
        _commit(run, iteration, list(members), [each for each in updates if each["iteration"] == iteration])
    return run


def _commit(run: Run, iteration: int, rows: list[Row], updates: list[Row]) -> None:
    rewards = [
        {
            **each,
            "name": name,
            "value": value,
            "weight": 1.0,
            "status": "ok" if value is not None else "error",
        }
        for each in rows
        for name, value in each["rewards"].items()
    ]
    logprobs = [
        {**each, "update_iteration": iteration, "step": 0, "mismatch": 0.0}
        for each in rows
        if each["policy_logprobs"] is not None
    ]
    steps = [{"epoch": 0, "step": 0, "skipped": False, "tokens": 1, **each} for each in updates]
    held = {"rollouts": rows, "rewards": rewards, "advantages": rows, "updates": steps, "logprobs": logprobs}
    for output, stage in STAGE_OUTPUTS.items():
        weights = {each["name"]: {"weight": 1.0} for each in rewards} if stage == "score" else None
        made_with = {} if weights is None else {"score": {"rewards": weights}}
        staging = Staging(run, Plan(stage, 1, output, iteration, made_with, {}), 0)
        records = []
        for table in ("updates", "logprobs") if output == "update" else (output,):
            schema = tables.schema(table)
            data = pa.Table.from_pylist(
                [{n: each.get(n) for n in schema.names} for each in held[table]], schema
            )
            records.append(staging.write_table(table, staging.file_name(table, 0), data))
        staging.commit(Product({output: id_of(records)}, records, {}))
