"""training: all optimiser steps of an iteration, from what is on disk; nothing is written.

The stage commits what comes out, and a replay compares it with what was committed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from grpo.artifacts import ActiveRun, Run
from grpo.update.batch import Rollouts, max_new_tokens_of, minibatches
from grpo.update.entropy import entropy_weight
from grpo.update.layout import ByRow
from grpo.update.learner import Learner
from grpo.update.mismatch import TOKEN_CAP, mismatch
from grpo.update.objective import Stored, needed, step_of
from grpo.update.schedule import learning_rate

Clock = Callable[[str], AbstractContextManager[None]]
Told = Callable[[ByRow], object]


def train(
    run: ActiveRun, iteration: int, rollouts: Rollouts, learner: Learner, clock: Clock, compare: Told = dict
) -> tuple[list[dict[str, Any]], Stored]:
    """All optimiser steps of the iteration: their rows of `updates`, and the log-probs met on the way.

    clock: times a part of it by name, in a `with` block. compare: told what the first step reads, before its
    gradient. Raises as Learner.step() and `compare` do.
    """
    config, max_new_tokens = run.config.update, max_new_tokens_of(run, iteration)
    read_B = needed(config, rollouts)
    stored = _stored_before(run, iteration, rollouts, np.flatnonzero(read_B), learner, clock)
    table: list[dict[str, Any]] = []
    before = _last_step(run, iteration) if config.entropy_target is not None else None
    with (
        clock("train"),
        run.console.progress(f"update {iteration}", len(rollouts) * config.epochs, "rollouts") as advance,
    ):
        on_read = _reading(stored, compare, advance)
        for number, (epoch, rows) in enumerate(steps(run, iteration, rollouts)):
            run.console.stop_requested()
            read = rows[read_B[rows]]
            row = _begun(run, (iteration, epoch, number), rollouts, rows)
            row["skipped"] = len(read) == 0
            if config.entropy_target is not None:
                row["entropy_coefficient"], applied = entropy_weight(config, before)
                learner.objective = replace(learner.objective, entropy_coefficient=applied)
            if len(read):
                # One max_new_tokens, whichever iteration a rollout is of.
                step = step_of(config, rollouts, rows, max_new_tokens, stored)
                numbers, logprobs = learner.step(rollouts, read, step, stored, row["learning_rate"], on_read)
                row |= numbers
                first = not stored.first_step
                stored.keep(logprobs, number)
                if first:
                    row |= _mismatch(run, iteration, rollouts, read, stored)
            table.append(before := row)
            advance(len(rows) - len(read))
    return table, stored


def _reading(stored: Stored, compare: Told, advance: Callable[[int], object]) -> Told:
    """What a micro-batch's log-probs are told to."""

    def on_read(logprobs: ByRow) -> None:
        if not stored.first_step:  # until the first step that is taken, the weights are pi_old's
            compare(logprobs)
        advance(len(logprobs))

    return on_read


def _begun(run: ActiveRun, at: tuple[int, int, int], rollouts: Rollouts, rows: np.ndarray) -> dict[str, Any]:
    """What a row of `updates` says before the step; at: its iteration, epoch and step."""
    iteration, _, number = at
    return {
        **dict(zip(("iteration", "epoch", "step"), at, strict=True)),
        "learning_rate": learning_rate(run.config, iteration, number),
        "rollouts": len(rows),
        "tokens": int(rollouts.num_tokens[rows].sum()),
    }


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


def steps(run: ActiveRun, iteration: int, rollouts: Rollouts) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, rows) of each optimiser step of the iteration, an epoch at a time."""
    config, seed = run.config.update, run.config.seed
    for epoch in range(config.epochs):
        for rows in minibatches(rollouts.keys, config.steps_per_iteration, seed, iteration, epoch):
            yield epoch, rows


def _stored_before(
    run: ActiveRun, iteration: int, rollouts: Rollouts, read: np.ndarray, learner: Learner, clock: Clock
) -> Stored:
    """What is needed before the first step: log-probs of the reference and of pi_old, and entropies."""
    config, stored = run.config.update, Stored()
    asked = config.steps_per_iteration
    per_epoch = len(minibatches(rollouts.keys, asked, run.config.seed, iteration, epoch=0))
    if per_epoch < asked:
        steps = f"{per_epoch} steps per epoch, not {asked}"
        run.console.say(f"update {iteration}: {steps}: no more groups have a kept rollout")
    if config.kl_coefficient and len(read):
        with clock("reference"):
            stored.reference = learner.reference_logprobs(rollouts, read)
    recomputed = config.old_logprobs == "recomputed" and config.epochs * per_epoch > 1
    if config.top_entropy is not None and len(read):
        with clock("recompute"):  # of every kept rollout: the share is of all tokens of a step
            logprobs, stored.entropy = learner.policy_entropies(rollouts, np.arange(len(rollouts)))
        stored.policy = {row: logprobs[row] for row in read.tolist()} if recomputed else {}
    elif recomputed and len(read):
        with clock("recompute"):
            stored.policy = learner.policy_logprobs(rollouts, read)
    return stored
