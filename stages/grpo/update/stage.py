"""update: policy + rollouts + advantages -> next policy, updates, logprobs.

The clipped objective on stored old log-probs. Weights, optimiser state and tables are one output: they
cannot disagree. Everything that is read or written is a committed table or checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.errors import InputError
from grpo.probe import FILE, measure, read_probe

if TYPE_CHECKING:
    import numpy as np

    from grpo.update.batch import Rollouts
    from grpo.update.learner import Learner, Stored

NAME = "update"
OUTPUT = "update"
STAGE_VERSION = 1
_NOT_RESULT = {"max_tokens_per_batch", "reference"}  # memory only; the reference counts by its id


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when an input is missing."""
    run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    run.require("advantages", iteration, f"grpo advantage --iteration {iteration}")
    references = [f"policy@{iteration}", f"rollouts@{iteration}", f"advantages@{iteration}"]
    if iteration > 0:
        references.append(f"optimizer@{iteration}")
    if run.config.update.kl_coefficient:
        references.append("reference")
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"seed": run.config.seed, "update": run.config.update.model_dump(exclude=_NOT_RESULT)},
        reads={reference: run.id_of(reference) or "" for reference in references},
    )


@contextmanager
def open_tool(run: Run) -> "Iterator[Learner]":
    """The learner, with nothing loaded yet."""
    from grpo.model import best_device
    from grpo.update.learner import Learner

    yield Learner(run.config.update, best_device())


def release(tool: "Learner") -> None:
    """Leave the accelerator to the next stage."""
    tool.release()


def run(run: Run, iteration: int, staging: Staging, tool: "Learner") -> Manifest:
    """Train on the kept rollouts of one iteration; commit policy, optimiser state and tables."""
    from grpo.update.batch import READ, kept_rollouts

    clock = staging.clock
    with clock("load"):
        _load(run, iteration, staging.plan, tool)
        sampled = run.read("rollouts", iteration, READ)
        rollouts = kept_rollouts(sampled, run.read("advantages", iteration))
    tool.holds = (None, None)  # until the commit has happened, memory is ahead of the disk
    rows, stored = _train(run, iteration, rollouts, tool, staging)
    with clock("write"):
        records = _write_tables(iteration, rollouts, rows, stored, staging)
        policy, optimizer = _write_checkpoint(run, tool, staging)
        probe = _write_probe(run, tool, staging)
        ids = {
            "policy": id_of(sorted(policy, key=lambda record: record.name)),
            "optimizer": id_of([optimizer]),
            "updates": id_of(records[:1]),
            "logprobs": id_of(records[1:]),
        }
    manifest = staging.commit(ids, [*records, *policy, probe, optimizer], _summary(rows))
    tool.holds = (ids["policy"], ids["optimizer"])
    return manifest


def require_optimizer(run: Run, iteration: int) -> None:
    """Raise InputError (exit 4) when the optimiser state that `iteration` starts from was pruned."""
    if iteration > 0 and (run.folder(OUTPUT, iteration - 1) / "pruned.json").exists():
        have = [number for number in run.iterations() if run.has_optimizer(number)]
        raise InputError(
            f"{run.folder(OUTPUT, iteration - 1) / 'optimizer'}: pruned (checkpoints.keep_optimizers);"
            " update can go on from iteration 0" + "".join(f", {number + 1}" for number in have)
        )


def _load(run: Run, iteration: int, plan: Plan, learner: "Learner") -> None:
    optimizer_path = None
    if iteration > 0:
        manifest = run.require(OUTPUT, iteration - 1, f"grpo update --iteration {iteration - 1}")
        [record] = [file for file in manifest.files if file.part == "optimizer"]
        optimizer_path = run.path_of(record, OUTPUT, iteration - 1)
        require_optimizer(run, iteration)
        run.verify(record, optimizer_path)
    ids = (plan.reads[f"policy@{iteration}"], plan.reads.get(f"optimizer@{iteration}"))
    learner.load(run.policy_folder(iteration), optimizer_path, ids)
    if run.config.update.kl_coefficient:
        learner.load_reference(run.start["reference"])


def _train(
    run: Run, iteration: int, rollouts: "Rollouts", learner: "Learner", staging: Staging
) -> "tuple[list[dict[str, Any]], Stored]":
    """All optimiser steps of the iteration: their rows of `updates`, and the log-probs met on the way."""
    from grpo.update.loss import Step
    from grpo.update.mismatch import mismatch

    steps = _steps(run, iteration, rollouts)
    stored = _stored_before(run, rollouts, learner, staging, len(steps))
    max_new_tokens = _max_new_tokens(run, iteration)
    table, moved = [], False
    total = sum(len(rows) for _, rows in steps)
    with (
        staging.clock("train"),
        run.console.progress(f"update {iteration}", total, "rollouts") as advance,
    ):
        for number, (epoch, rows) in enumerate(steps):
            run.console.stop_requested()
            row = _row(run, rollouts, rows, iteration, epoch, number)
            if not row["skipped"]:
                denominators = Step(row["rollouts"], row["tokens"], max_new_tokens)
                row |= learner.step(rollouts, rows, denominators, stored, number)
                if not moved:  # until the first step that is taken, the weights are pi_old's
                    own = [stored.policy[i] for i in rows]
                    row |= mismatch(own, [rollouts.old_logprobs[i] for i in rows], _token_cap(run))
                moved = True
            table.append(row)
            advance(len(rows))
    return table, stored


def _steps(run: Run, iteration: int, rollouts: "Rollouts") -> "list[tuple[int, np.ndarray]]":
    """(epoch, rows) of each optimiser step of the iteration."""
    from grpo.update.batch import minibatches

    config = run.config.update
    steps = [
        (epoch, rows)
        for epoch in range(config.epochs)
        for rows in minibatches(rollouts.keys, config.steps_per_iteration, run.config.seed, iteration, epoch)
    ]
    if len(steps) < config.epochs * config.steps_per_iteration:
        run.console.say(
            f"update {iteration}: {len(steps) // config.epochs} steps per epoch, not"
            f" {config.steps_per_iteration}: no more groups have a kept rollout"
        )
    return steps


def _stored_before(
    run: Run, rollouts: "Rollouts", learner: "Learner", staging: Staging, num_steps: int
) -> "Stored":
    """Log-probs that are needed before the first step: the reference's, and pi_old where it is recomputed."""
    import numpy as np

    from grpo.update.learner import Stored

    config, everything = run.config.update, np.arange(len(rollouts))
    stored = Stored()
    if config.kl_coefficient and len(rollouts):
        with staging.clock("reference"):
            stored.reference = learner.reference_logprobs(rollouts, everything)
    if config.old_logprobs == "recomputed" and num_steps > 1 and len(rollouts):
        with staging.clock("recompute"):
            stored.policy = learner.policy_logprobs(rollouts, everything)
    return stored


def _row(
    run: Run, rollouts: "Rollouts", rows: "np.ndarray", iteration: int, epoch: int, number: int
) -> dict[str, Any]:
    """The columns of `updates` that are known before the step."""
    config = run.config.update
    signal = bool(config.kl_coefficient) or bool(rollouts.advantages[rows].any())
    return {
        "iteration": iteration,
        "epoch": epoch,
        "step": number,
        "learning_rate": config.learning_rate,
        "rollouts": len(rows),
        "tokens": int(rollouts.num_tokens[rows].sum()),
        "skipped": not (len(rows) and signal),
    }


def _token_cap(run: Run) -> float:
    """Cap of a token's weight: the configured one, where it is for tokens."""
    from grpo.update.mismatch import TOKEN_CAP

    config = run.config.update
    return config.sampler_correction_cap if config.sampler_correction_level == "token" else TOKEN_CAP


def _max_new_tokens(run: Run, iteration: int) -> int:
    """What the rollouts were sampled with; the configuration may have changed since."""
    manifest = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    return int(manifest.config["generate"]["max_new_tokens"])


def _write_tables(
    iteration: int, rollouts: "Rollouts", rows: list[dict[str, Any]], stored: "Stored", staging: Staging
) -> list[FileRecord]:
    import numpy as np

    updates = pa.Table.from_pylist(rows, schema=tables.schema("updates"))
    read = sorted(stored.first_step)
    gaps = [
        float(np.abs(stored.policy[i].astype(np.float64) - rollouts.old_logprobs[i]).mean()) for i in read
    ]
    columns = {
        **{name: rollouts.keys[read, position] for position, name in enumerate(tables.KEY)},
        "update_iteration": [iteration] * len(read),
        "step": [stored.first_step[i] for i in read],
        "policy_logprobs": [stored.policy[i] for i in read],
        "reference_logprobs": [stored.reference.get(i) for i in read],
        "mismatch": gaps,
    }
    logprobs = pa.table(columns, schema=tables.schema("logprobs"))
    return [
        staging.write_table("updates", staging.file_name("updates", 0), updates),
        staging.write_table("logprobs", staging.file_name("logprobs", 0), logprobs),
    ]


def _write_checkpoint(run: Run, learner: "Learner", staging: Staging) -> tuple[list[FileRecord], FileRecord]:
    from grpo.update.checkpoint import OPTIMIZER_FILE, optimizer_file, policy_files

    policy = [
        staging.write_bytes("policy", name, content)
        for name, content in policy_files(learner.model, run.policy_folder(0))
    ]
    moments = optimizer_file(learner.optimizer, learner.model)
    return policy, staging.write_bytes("optimizer", OPTIMIZER_FILE, moments)


def _write_probe(run: Run, learner: "Learner", staging: Staging) -> FileRecord:
    """Probe the new policy with the sequences of the starting one's probe."""
    sequences = read_probe(run.probe_path(0)).sequences
    return staging.write_bytes("policy", FILE, measure(learner.model, sequences).encode())


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `grpo status` shows of the update: of the first step that was taken."""
    names = ("loss", "kl", "entropy", "grad_norm", "mismatch_mean", "mismatch_max")
    taken = next((row for row in rows if not row["skipped"]), rows[0])
    first = {name: taken.get(name) for name in names}
    return {**first, "steps": len(rows), "skipped": sum(row["skipped"] for row in rows)}
