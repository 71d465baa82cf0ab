"""update: policy + rollouts + advantages -> next policy, updates, logprobs.

The clipped objective on stored old log-probs. Weights, optimiser state and tables are one output: they
cannot disagree. Everything that is read or written is a committed table or checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.errors import EngineError, InputError
from grpo.probe import FILE, measure, read_probe
from grpo.update.check import check_schedule

if TYPE_CHECKING:
    import numpy as np

    from grpo.update.batch import Rollouts
    from grpo.update.learner import Learner
    from grpo.update.objective import Stored

NAME = "update"
OUTPUT = "update"
STAGE_VERSION = 2
# Memory and time only, but for rounding; the reference counts by its id.
_NOT_RESULT = {"max_tokens_per_batch", "gradient_checkpointing", "prompt_sharing", "reference"}
_ROWS_PER_SHARD = 2048  # of `logprobs`, one Parquet file and row group each


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when an input is missing."""
    run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    run.require("advantages", iteration, f"grpo advantage --iteration {iteration}")
    references = [f"policy@{iteration}", f"rollouts@{iteration}", f"advantages@{iteration}"]
    if iteration > 0:
        references.append(f"optimizer@{iteration}")
        if run.config.update.lora:
            references.append(f"adapter@{iteration}")
    update = run.config.update
    if update.kl_coefficient:
        references.append("reference")
    config = {"seed": run.config.seed, "update": update.model_dump(exclude=_NOT_RESULT)}
    if update.schedule != "constant":
        config["iterations"] = run.config.iterations  # over which the learning rate falls
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config=config,
        reads={reference: run.id_of(reference) or "" for reference in references},
    )


@contextmanager
def open_tool(run: Run) -> "Iterator[Learner]":
    """The learner, with nothing loaded yet."""
    from grpo.model import best_device
    from grpo.update.learner import Learner

    yield Learner(run.config.update, best_device(), run.config.seed)


def release(tool: "Learner") -> None:
    """Leave the accelerator to the next stage."""
    tool.release()


def run(run: Run, iteration: int, staging: Staging, tool: "Learner") -> Manifest:
    """Train on the kept rollouts of one iteration; commit policy, optimiser state and tables."""
    from grpo.update.batch import READ, kept_rollouts

    clock = staging.clock
    with clock("load"):
        _load(run, iteration, staging.plan, tool)
        shards = run.read_shards("rollouts", iteration, READ)
        rollouts = kept_rollouts(shards, run.read("advantages", iteration), staging.folder)
    with clock("check"):
        before = run.manifest(OUTPUT, iteration - 1) if iteration > 0 else None
        last = before.summary["layout"] if before is not None else None
        layout = tool.check_layout(rollouts, _longest(run, iteration), last)
        _say_refused(run, iteration, layout)
    tool.holds = (None, None)  # until the commit has happened, memory is ahead of the disk
    rows, stored = _train(run, iteration, rollouts, tool, staging)
    with clock("write"):
        updates = _write_updates(rows, staging)
        logprobs = _write_logprobs(iteration, rollouts, stored, staging)
        policy, adapter, optimizer = _write_checkpoint(run, tool, staging)
        probe = _write_probe(run, tool, staging)
        ids = {
            "policy": id_of(sorted(policy, key=lambda record: record.name)),
            "optimizer": id_of([optimizer]),
            "updates": id_of([updates]),
            "logprobs": id_of(logprobs),
            **({"adapter": id_of(adapter)} if adapter else {}),
        }
    held = [updates, *logprobs, *policy, *adapter, probe, optimizer]
    manifest = staging.commit(ids, held, {**_summary(rows), **layout})
    tool.holds = (ids["policy"], ids["optimizer"])
    return manifest


def _load(run: Run, iteration: int, plan: Plan, learner: "Learner") -> None:
    optimizer = adapter = None
    policy = run.policy_folder(iteration)
    if iteration > 0:
        manifest = run.require(OUTPUT, iteration - 1, f"grpo update --iteration {iteration - 1}")
        [optimizer] = _verified(run, manifest, "optimizer")
        weights = _verified(run, manifest, "adapter")
        if bool(weights) != bool(run.config.update.lora):
            trained = "an adapter" if weights else "all weights"
            raise InputError(f"update.lora: {run.name} trains {trained}; what trains is fixed for a run")
        if weights:
            policy, adapter = run.start["policy"], weights[0].parent
    ids = (plan.reads[f"policy@{iteration}"], plan.reads.get(f"optimizer@{iteration}"))
    learner.load(policy, optimizer, ids, adapter)
    if run.config.update.kl_coefficient:
        is_start = run.id_of("reference") == run.id_of("policy@0")
        learner.load_reference(run.start["reference"], is_start=is_start)


def _verified(run: Run, manifest: Manifest, part: str) -> list[Path]:
    """The files of a part of an update, once they are known to be as they were written."""
    paths = []
    for record in (record for record in manifest.files if record.part == part):
        paths.append(run.path_of(record, OUTPUT, manifest.iteration))
        run.verify(record, paths[-1])
    return paths


def _say_refused(run: Run, iteration: int, layout: dict[str, Any]) -> None:
    for model in ("policy", "reference"):
        if refused := layout.get(f"{model}_layout_refused"):
            difference = layout[f"{model}_layout_difference"]
            run.console.say(
                f"update {iteration}: log-probs of the {model} in the layout `{refused}` are {difference:.1e}"
                " off; each rollout is read by itself, which is right and slower"
            )


def _train(
    run: Run, iteration: int, rollouts: "Rollouts", learner: "Learner", staging: Staging
) -> "tuple[list[dict[str, Any]], Stored]":
    """All optimiser steps of the iteration: their rows of `updates`, and the log-probs met on the way."""
    from grpo.update.loss import Step
    from grpo.update.mismatch import mismatch

    stored = _stored_before(run, rollouts, learner, staging, _num_steps(run, iteration, rollouts))
    _, max_new_tokens = _longest(run, iteration)
    table: list[dict[str, Any]] = []
    taken = 0
    total = len(rollouts) * run.config.update.epochs
    with (
        staging.clock("train"),
        run.console.progress(f"update {iteration}", total, "rollouts") as advance,
    ):
        for number, (epoch, rows) in enumerate(_steps(run, iteration, rollouts)):
            run.console.stop_requested()
            row = _row(run, rollouts, rows, iteration, epoch, number)
            if not row["skipped"]:
                denominators = Step(row["rollouts"], row["tokens"], max_new_tokens)
                row |= learner.step(rollouts, rows, denominators, stored, number, row["learning_rate"])
                if not taken:  # until the first step that is taken, the weights are pi_old's
                    read = [i for i in rows.tolist() if i in stored.first_step]
                    pairs = ((stored.policy[i], rollouts.old_logprobs[i]) for i in read)
                    row |= mismatch(pairs, _token_cap(run))
                taken += 1
            table.append(row)
            advance(len(rows))
    return table, stored


def _num_steps(run: Run, iteration: int, rollouts: "Rollouts") -> int:
    """How many optimiser steps the iteration has."""
    from grpo.update.batch import num_minibatches

    config = run.config.update
    per_epoch = num_minibatches(rollouts.keys, config.steps_per_iteration)
    if per_epoch < config.steps_per_iteration:
        run.console.say(
            f"update {iteration}: {per_epoch} steps per epoch, not {config.steps_per_iteration}:"
            " no more groups have a kept rollout"
        )
    return config.epochs * per_epoch


def _steps(run: Run, iteration: int, rollouts: "Rollouts") -> "Iterator[tuple[int, np.ndarray]]":
    """(epoch, rows) of each optimiser step of the iteration, an epoch at a time."""
    from grpo.update.batch import minibatches

    config, seed = run.config.update, run.config.seed
    for epoch in range(config.epochs):
        for rows in minibatches(rollouts.keys, config.steps_per_iteration, seed, iteration, epoch):
            yield epoch, rows


def _stored_before(
    run: Run, rollouts: "Rollouts", learner: "Learner", staging: Staging, num_steps: int
) -> "Stored":
    """Log-probs that are needed before the first step: the reference's, and pi_old where it is recomputed."""
    import numpy as np

    from grpo.update.objective import Stored, needed
    from grpo.update.scratch import LogprobStore

    config = run.config.update
    counts = rollouts.num_tokens
    stored = Stored(LogprobStore(staging.folder, counts), LogprobStore(staging.folder, counts))
    read = needed(config, rollouts, np.arange(len(rollouts)))
    if config.kl_coefficient and len(read):
        with staging.clock("reference"):
            learner.reference_logprobs(rollouts, read, into=stored.reference)
    if config.old_logprobs == "recomputed" and num_steps > 1 and len(read):
        with staging.clock("recompute"):
            learner.policy_logprobs(rollouts, read, into=stored.policy)
    return stored


def _row(
    run: Run, rollouts: "Rollouts", rows: "np.ndarray", iteration: int, epoch: int, number: int
) -> dict[str, Any]:
    """The columns of `updates` that are known before the step."""
    from grpo.update.objective import needed

    return {
        "iteration": iteration,
        "epoch": epoch,
        "step": number,
        "learning_rate": _learning_rate(run, iteration, number),
        "rollouts": len(rows),
        "tokens": int(rollouts.num_tokens[rows].sum()),
        "skipped": not len(needed(run.config.update, rollouts, rows)),
    }


def _learning_rate(run: Run, iteration: int, number: int) -> float:
    """Learning rate of a step; the schedule counts the steps that are configured, taken or not."""
    from grpo.update.schedule import learning_rate

    config = run.config.update
    per_iteration = config.epochs * config.steps_per_iteration
    check_schedule(run.config, iteration)
    num_steps = max(run.config.iterations, iteration + 1) * per_iteration
    step = iteration * per_iteration + number
    return learning_rate(config.learning_rate, config.schedule, step, num_steps, config.warmup_steps)


def _token_cap(run: Run) -> float:
    """Cap of a token's weight: the configured one, where it is for tokens."""
    from grpo.update.mismatch import TOKEN_CAP

    config = run.config.update
    return config.sampler_correction_cap if config.sampler_correction_level == "token" else TOKEN_CAP


def _longest(run: Run, iteration: int) -> tuple[int, int]:
    """Tokens of the run's longest prompt, and max_new_tokens of the rollouts: it may have changed since."""
    prompts = run.require("prompts", None, "grpo run")
    rollouts = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    return int(prompts.summary["longest_prompt_tokens"]), int(rollouts.config["generate"]["max_new_tokens"])


def _write_updates(rows: list[dict[str, Any]], staging: Staging) -> FileRecord:
    updates = pa.Table.from_pylist(rows, schema=tables.schema("updates"))
    return staging.write_table("updates", staging.file_name("updates", 0), updates)


def _write_logprobs(
    iteration: int, rollouts: "Rollouts", stored: "Stored", staging: Staging
) -> list[FileRecord]:
    """The shards of `logprobs`, in key order; one without rows where nothing was read."""
    read = sorted(stored.first_step)
    starts = range(0, max(len(read), 1), _ROWS_PER_SHARD)
    return [
        staging.write_table(
            "logprobs",
            staging.file_name("logprobs", shard),
            _logprobs(iteration, rollouts, stored, read[start : start + _ROWS_PER_SHARD]),
        )
        for shard, start in enumerate(starts)
    ]


def _logprobs(iteration: int, rollouts: "Rollouts", stored: "Stored", read: list[int]) -> pa.Table:
    import numpy as np

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
    return pa.table(columns, schema=tables.schema("logprobs"))


def _write_checkpoint(
    run: Run, learner: "Learner", staging: Staging
) -> tuple[list[FileRecord], list[FileRecord], FileRecord]:
    """The policy, the adapter where one trains, and the optimiser state."""
    from grpo.update.adapter import adapter_files
    from grpo.update.checkpoint import OPTIMIZER_FILE, optimizer_file, policy_files

    policy = [
        staging.write_bytes("policy", name, content)
        for name, content in policy_files(learner.model, run.policy_folder(0), learner.adapter)
    ]
    files = adapter_files(learner.adapter) if learner.adapter is not None else ()
    adapter = [staging.write_bytes("adapter", name, content) for name, content in files]
    moments = optimizer_file(learner.optimizer, learner.model)
    return policy, adapter, staging.write_bytes("optimizer", OPTIMIZER_FILE, moments)


def _write_probe(run: Run, learner: "Learner", staging: Staging) -> FileRecord:
    """Probe the new policy with the sequences of the starting one's probe.

    Raises EngineError (exit 8) when it has no finite log-probs: then the steps have ruined it.
    """
    probe = measure(learner.model, read_probe(run.probe_path(0)).sequences)
    if not probe.is_finite():
        raise EngineError(
            "update: the log-probs of the new policy are not finite; lower update.learning_rate or"
            " update.weight_decay; nothing was committed"
        )
    return staging.write_bytes("policy", FILE, probe.encode())


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `grpo status` shows of the update: of the first step that was taken."""
    names = ("loss", "kl", "entropy", "grad_norm", "mismatch_mean", "mismatch_max")
    taken = next((row for row in rows if not row["skipped"]), rows[0])
    first = {name: taken.get(name) for name in names}
    return {**first, "steps": len(rows), "skipped": sum(row["skipped"] for row in rows)}
