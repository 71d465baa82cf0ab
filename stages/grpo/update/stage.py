"""update: policy + rollouts + advantages -> next policy, updates, logprobs.

The clipped objective on stored old log-probs. Weights, optimiser state and tables are one output: they
cannot disagree.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo.artifacts import ActiveRun, Manifest, Plan, Product, Run, Staging, id_of, prune_behind
from grpo.errors import InputError
from grpo.models.loading import best_device
from grpo.update.adapter import check_modules, require_peft
from grpo.update.batch import Rollouts, longest, max_new_tokens_of, minibatches, read_kept
from grpo.update.entropy import entropy_weight
from grpo.update.learner import Learner
from grpo.update.mismatch import TOKEN_CAP, mismatch
from grpo.update.objective import Stored, needed, objective_of, step_of
from grpo.update.optimizer import require_optimizer
from grpo.update.outputs import IDS, summary_of, write_outputs
from grpo.update.own_surrogate import surrogate_of
from grpo.update.plan import OUTPUT, reference_of, require_reference
from grpo.update.schedule import check_schedule, learning_rate


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Check what iterations before `until` need; no weight is read.

    Raises UsageError (exit 2) for a schedule that ends before them, a surrogate that cannot be maximised,
    targets the model has not or a library that is missing, InputError (exit 4) where the next reference was
    pruned or the optimiser is another one than before.
    """
    check_schedule(run.config, until - 1)
    surrogate_of(run)
    done = (run.manifest(OUTPUT, number) for number in reversed(run.iterations()))
    if (last := next(filter(None, done), None)) is not None and last.iteration is not None:
        _check_optimizer(run, last)
        require_reference(run, last.iteration + 1)
    require_optimizer(run.config.update)
    if lora := run.config.update.lora:
        require_peft()
        check_modules(run.start["policy"], lora)


@contextmanager
def open_resource(run: ActiveRun) -> Iterator[Learner]:
    """The learner, with nothing loaded yet."""
    attention = run.config.model_options.attn_implementation
    yield Learner(run.config.update, best_device(), run.config.seed, attention)


def release(learner: Learner) -> None:
    """Leave the accelerator to the next stage."""
    learner.release()


def after(run: ActiveRun, manifest: Manifest, learner: Learner) -> None:
    """What is in memory is what was just committed; checkpoints that are no longer kept go."""
    learner.holds = (manifest.ids["policy"], manifest.ids["optimizer"])
    assert manifest.iteration is not None
    prune_behind(run, manifest.iteration)


def produce(run: ActiveRun, iteration: int, staging: Staging, learner: Learner) -> Product:
    """Train on the kept rollouts of one iteration: policy, optimiser state and tables."""
    clock = staging.clock
    with clock("load"):
        _load(run, iteration, staging.plan, learner)
        vocabulary = learner.model.config.get_text_config().vocab_size
        rollouts = read_kept(run, iteration, vocabulary)
    with clock("check"):
        before = run.manifest(OUTPUT, iteration - 1) if iteration > 0 else None
        last = before.summary.get("layout") if before is not None else None
        layout = learner.check_layout(rollouts, longest(run, iteration), last)
        _say_refused(run, iteration, layout)
    if own := surrogate_of(run):
        if {"update.surrogate": own.sha256} != staging.plan.user_files:
            raise InputError(f"update.surrogate: {own.file} changed as the update began; run it again")
        learner.objective = objective_of(run.config.update, own)
    learner.holds = (None, None)  # until the commit has happened, memory is ahead of the disk
    rows, stored = _train(run, iteration, rollouts, learner, staging)
    with clock("write"):
        held = write_outputs(run, iteration, rows, rollouts, stored, learner, staging)
    ids = {name: id_of(sorted(held[name], key=lambda file: file.name)) for name in IDS if held[name]}
    return Product(ids, [file for files in held.values() for file in files], {**summary_of(rows), **layout})


def _load(run: ActiveRun, iteration: int, plan: Plan, learner: Learner) -> None:
    optimizer = adapter = None
    policy = run.policy_folder(iteration)
    if iteration > 0:
        manifest = run.require(OUTPUT, iteration - 1, f"grpo update --iteration {iteration - 1}")
        [optimizer] = _verified(run, manifest, "optimizer")
        weights = _verified(run, manifest, "adapter")
        if bool(weights) != bool(run.config.update.lora):
            trained = "an adapter" if weights else "all weights"
            raise InputError(f"update.lora: {run.name} trains {trained}; what trains is fixed for a run")
        _check_optimizer(run, manifest)
        if weights:
            policy, adapter = run.start["policy"], weights[0].parent
    ids = (plan.inputs[f"policy@{iteration}"], plan.inputs.get(f"optimizer@{iteration}"))
    learner.load(policy, optimizer, ids, adapter)
    if run.config.update.kl_coefficient:
        require_reference(run, iteration)
        number = run.config.update.moved_reference(iteration)
        checkpoint = run.policy_folder(number) if number else run.start["reference"]
        id_ = plan.inputs[reference_of(run.config.update, iteration)]
        learner.load_reference(checkpoint, id_, is_start=id_ == run.id_of("policy@0"))


def _check_optimizer(run: ActiveRun, last: Manifest) -> None:
    """Raise InputError (exit 4) where the state that `last` left is of another optimiser."""
    before, now = last.config["update"].get("optimizer", "adamw"), run.config.update.optimizer
    if before != now:
        raise InputError(f"update.optimizer: {run.name} has {before}, found {now}; it is fixed for a run")


def _verified(run: Run, manifest: Manifest, part: str) -> list[Path]:
    """The files of a part of an update, once they are known to be as they were written."""
    records = [record for record in manifest.files if record.part == part]
    paths = [run.path_of(record, OUTPUT, manifest.iteration) for record in records]
    for record, path in zip(records, paths, strict=True):
        run.verify(record, path)
    return paths


def _say_refused(run: ActiveRun, iteration: int, layout: dict[str, Any]) -> None:
    for model in ("policy", "reference"):
        if refused := layout.get(f"{model}_layout_refused"):
            difference = layout[f"{model}_layout_difference"]
            run.console.say(
                f"update {iteration}: log-probs of the {model} in the layout `{refused}` are {difference:.1e}"
                " off; each rollout is read alone, which is right and slower"
            )


def _train(
    run: ActiveRun, iteration: int, rollouts: Rollouts, learner: Learner, staging: Staging
) -> tuple[list[dict[str, Any]], Stored]:
    """All optimiser steps of the iteration: their rows of `updates`, and the log-probs met on the way."""
    config, max_new_tokens = run.config.update, max_new_tokens_of(run, iteration)
    read_B = needed(config, rollouts)
    stored = _stored_before(run, iteration, rollouts, np.flatnonzero(read_B), learner, staging)
    table: list[dict[str, Any]] = []
    before = _last_step(run, iteration) if config.entropy_target is not None else None
    with (
        staging.clock("train"),
        run.console.progress(f"update {iteration}", len(rollouts) * config.epochs, "rollouts") as advance,
    ):
        for number, (epoch, rows) in enumerate(_steps(run, iteration, rollouts)):
            run.console.stop_requested()
            read = rows[read_B[rows]]
            row: dict[str, Any] = {
                "iteration": iteration,
                "epoch": epoch,
                "step": number,
                "learning_rate": learning_rate(run.config, iteration, number),
                "rollouts": len(rows),
                "tokens": int(rollouts.num_tokens[rows].sum()),
                "skipped": len(read) == 0,
            }
            if config.entropy_target is not None:
                row["entropy_coefficient"], applied = entropy_weight(config, before)
                learner.objective = replace(learner.objective, entropy_coefficient=applied)
            if len(read):
                # One max_new_tokens, whichever iteration a rollout is of.
                step = step_of(config, rollouts, rows, max_new_tokens, stored)
                numbers, logprobs = learner.step(rollouts, read, step, stored, row["learning_rate"])
                row |= numbers
                first = not stored.first_step
                stored.keep(logprobs, number)
                if first:  # until the first step that is taken, the weights are pi_old's
                    row |= _mismatch(run, iteration, rollouts, read, stored)
            table.append(before := row)
            advance(len(rows))
    return table, stored


def _last_step(run: Run, iteration: int) -> dict[str, Any] | None:
    """The row of `updates` of the step before those of `iteration`; None: there is none."""
    if iteration == 0:
        return None
    last: dict[str, Any] = run.read("updates", iteration - 1).to_pylist()[-1]
    return last


def _mismatch(
    run: ActiveRun, iteration: int, rollouts: Rollouts, read: np.ndarray, stored: Stored
) -> dict[str, float]:
    """The mismatch columns of the first step, of this iteration's rollouts that it read; none, no columns."""
    # The ratio of an older one has moved for good reason.
    own = read[rollouts.keys[read, 0] == iteration].tolist()
    config = run.config.update
    by_token = config.sampler_correction_level == "token"
    cap = config.sampler_correction_cap if by_token else TOKEN_CAP
    pairs = ((stored.policy[i], rollouts.old_logprobs[i]) for i in own)
    return mismatch(pairs, cap) if own else {}


def _steps(run: ActiveRun, iteration: int, rollouts: Rollouts) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, rows) of each optimiser step of the iteration, an epoch at a time."""
    config, seed = run.config.update, run.config.seed
    for epoch in range(config.epochs):
        for rows in minibatches(rollouts.keys, config.steps_per_iteration, seed, iteration, epoch):
            yield epoch, rows


def _stored_before(
    run: ActiveRun, iteration: int, rollouts: Rollouts, read: np.ndarray, learner: Learner, staging: Staging
) -> Stored:
    """What is needed before the first step: log-probs of the reference and of pi_old, and entropies."""
    config, stored = run.config.update, Stored()
    asked = config.steps_per_iteration
    per_epoch = len(minibatches(rollouts.keys, asked, run.config.seed, iteration, epoch=0))
    if per_epoch < asked:
        steps = f"{per_epoch} steps per epoch, not {asked}"
        run.console.say(f"update {iteration}: {steps}: no more groups have a kept rollout")
    if config.kl_coefficient and len(read):
        with staging.clock("reference"):
            stored.reference = learner.reference_logprobs(rollouts, read)
    recomputed = config.old_logprobs == "recomputed" and config.epochs * per_epoch > 1
    if config.top_entropy is not None and len(read):
        with staging.clock("recompute"):  # of every kept rollout: the share is of all tokens of a step
            logprobs, stored.entropy = learner.policy_entropies(rollouts, np.arange(len(rollouts)))
        stored.policy = {row: logprobs[row] for row in read.tolist()} if recomputed else {}
    elif recomputed and len(read):
        with staging.clock("recompute"):
            stored.policy = learner.policy_logprobs(rollouts, read)
    return stored
