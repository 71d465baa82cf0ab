"""runs: a run on disk from rollouts in memory, without the stages before."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tests.update.examples import MAX_NEW_TOKENS

from grpo import tables
from grpo.artifacts import POLICY, STAGE_OUTPUTS, ActiveRun, Plan, Product, Run, Staging, held_part, id_of
from grpo.config import Config
from grpo.console import Console
from grpo.models import weight_check
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.pipeline.stages import UPDATE, make
from grpo.update.batch import Rollouts
from grpo.update.durable import Checkpoints
from grpo.update.learner import Learner
from grpo.update.plan import plan as planned
from grpo.update.policies import Policies, rebuilt_part


def commit_table(
    run: Run, table: str, iteration: int, data: pa.Table, config: dict[str, Any] | None = None
) -> None:
    staging = Staging(run, Plan(STAGE_OUTPUTS.get(table, table), 1, table, iteration, config or {}, {}), 0)
    record = staging.write_table(table, staging.file_name("part", 0), data)
    staging.commit(Product({table: id_of([record])}, [record], {}))


def make_run(root: Path, config: Config, policy: Path, reference: Path) -> ActiveRun:
    run = ActiveRun(root, config, root, Console(quiet=True))
    staging = Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0)
    sequences = weight_check.check_sequences([range(10)], context=None)
    record = staging.write_bytes(
        "", weight_check.FILE, weight_check.measure(Reader(load_model(policy, "cpu")), sequences).encode()
    )
    staging.commit(Product({"policy": "start", "reference": "reference"}, [record], {}))
    staging = Staging(run, Plan("prompts", 1, "prompts", None, {}, {}), 0)
    staging.commit(Product({"prompts": "prompts"}, [], {"longest_prompt_tokens": 6}))
    run.start = {"policy": policy, "reference": reference}
    return run


def commit_rollouts(run: Run, iteration: int, kept: Rollouts, unkept: Rollouts | None = None) -> None:
    """`rollouts` and `advantages` of an iteration, the rollouts that are not kept in front."""
    rows, advantages = [], []
    for rollouts, keep in ((unkept, False), (kept, True)):
        for i in range(len(rollouts) if rollouts else 0):
            assert rollouts is not None
            old = np.full(len(rollouts.masks[i]), -50.0)  # where the mask is false, nothing may read it
            old[rollouts.masks[i]] = rollouts.old_logprobs[i]
            group, sample = rollouts.keys[i, 1:].tolist()
            key = {"iteration": iteration, "group_id": group if keep else group - 100, "sample_id": sample}
            rows.append(
                {
                    **key,
                    "prompt_token_ids": rollouts.prompts[i].tolist(),
                    "response_token_ids": rollouts.responses[i].tolist(),
                    "old_logprobs": old.tolist(),
                    "response_mask": rollouts.masks[i].tolist(),
                    "response_tokens": len(old),
                    "temperature": float(rollouts.temperatures[i]),
                }
            )
            advantage = float(rollouts.advantages[i]) if keep else None
            advantages.append({**key, "advantage": advantage, "keep": keep})
    config = {"generate": {"max_new_tokens": MAX_NEW_TOKENS}}
    schema = tables.schema
    commit_table(run, "rollouts", iteration, pa.Table.from_pylist(rows, schema=schema("rollouts")), config)
    commit_table(run, "advantages", iteration, pa.Table.from_pylist(advantages, schema=schema("advantages")))


@contextmanager
def whole(run: ActiveRun, policy: int, scratch: Path) -> Iterator[Path]:
    """A policy as an ordinary checkpoint, on disk or not."""
    if (folder := held_part(run, policy, POLICY)) is not None:
        yield folder
        return
    with rebuilt_part(run, policy, POLICY, scratch) as folder:
        yield folder


def update(run: ActiveRun, iteration: int, learner: Learner) -> list[dict[str, Any]]:
    policies = Policies(run, learner, Checkpoints(run))
    make(run, UPDATE, Staging(run, planned(run, iteration), 0), policies)
    policies.make_durable(iteration + 1)
    rows: list[dict[str, Any]] = run.read("updates", iteration).to_pylist()
    return rows
