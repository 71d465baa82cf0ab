"""optimizer_step: one step of AdamW on some rollouts of an iteration, and what may be wrong with it.

Of several processes each computes a share. What one of them finds wrong is told to all before anything is
changed, and until then it takes part in what the others compute.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from grpo.errors import EngineError
from grpo.update.batch import Rollouts, room_for
from grpo.update.collective import collective
from grpo.update.given import Objective, Step
from grpo.update.layout import ByRow, MicroBatch, by_row, tree_of
from grpo.update.objective import Stored, Sums, batch_loss, given_of, name_keys
from grpo.update.own_surrogate import NotFiniteError
from grpo.update.reading import micro_batches

if TYPE_CHECKING:
    from grpo.update.learner import Learner
    from grpo.update.parallel import Ranks

Told = Callable[[ByRow], object]


class _SuspectError(EngineError, exit_code=8):
    """Log-probs of `rows` are not finite where they were read together: whose, all processes find out."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"log-probs are not finite: rows {rows}")
        self.rows = rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _SuspectError, (self.rows,)


@dataclass
class _Share:
    """What a process found in its part of a step."""

    sums: Sums = field(default_factory=Sums)
    logprobs: ByRow = field(default_factory=dict)
    error: EngineError | None = None


@collective
def take_step(
    learner: "Learner",
    rollouts: Rollouts,
    rows: np.ndarray,
    step: Step,
    stored: Stored,
    objective: Objective,
    learning_rate: float,
    *,
    on_read: Told = dict,
) -> tuple[dict[str, Any], ByRow]:
    """See Learner.step()."""
    learner.objective = objective  # of rank 0
    learner.optimizer.zero_grad(set_to_none=True)
    own = _share(learner, rollouts, rows, step, stored, on_read)
    found = own if learner.ranks is None else _exchanged(learner.ranks, own, on_read)
    if isinstance(found.error, _SuspectError):
        broken = _broken_alone(learner, rollouts, found.error.rows)
        named = name_keys(rollouts, list(broken or found.error.rows))
        raise EngineError(f"update: policy_logprobs are not finite on {named}")
    if found.error is not None:
        raise found.error
    grad_norm = _clip_gradient(learner, rollouts, rows, step, stored)
    learner.optimizer.param_groups[0]["lr"] = learning_rate
    learner.optimizer.step()
    learner.network.refresh()
    return {**found.sums.row(learner.objective), "grad_norm": grad_norm}, found.logprobs


def _share(
    learner: "Learner", rollouts: Rollouts, rows: np.ndarray, step: Step, stored: Stored, on_read: Told
) -> _Share:
    """Forward and backward pass of each micro-batch of this process's.

    Alone, it raises what is wrong with the first; else it goes on to take part in those of the others.
    """
    found, room = _Share(), room_for(rollouts, rows)
    for batch in micro_batches(learner, learner.network, rollouts, rows):
        if batch is None or found.error is not None:
            learner.network.take_part()
            continue
        logprobs_N, entropy_N = learner.network.logprobs(batch, with_entropy=True)
        assert entropy_N is not None
        try:
            if learner.ranks is not None and not bool(logprobs_N.isfinite().all()):
                raise _SuspectError(batch.rows.tolist())
            loss, part, own = _loss(learner, rollouts, batch, step, stored, (logprobs_N, entropy_N), room)
            on_read(own)
        except EngineError as error:
            if learner.ranks is None:
                raise
            found.error, loss = error, logprobs_N.sum() * 0
        else:
            found.sums, found.logprobs = found.sums + part, found.logprobs | own
        loss.backward()  # type: ignore[no-untyped-call]
    return found


def _exchanged(ranks: "Ranks", own: _Share, on_read: Told) -> _Share:
    """The sums of all processes and the first error; on rank 0 the log-probs of all, elsewhere one's own."""
    shares = ranks.to_first(own)
    found = _Share(sum((each.sums for each in shares), Sums()), own.logprobs)
    if len(shares) > 1:
        found.error = next((each.error for each in shares if each.error is not None), None)
        for each in shares[1:]:
            try:
                on_read(each.logprobs)
            except EngineError as error:
                found.error = found.error or error
    found.sums, found.error = ranks.from_first((found.sums, found.error))
    if len(shares) > 1:
        found.logprobs = {row: values for each in shares for row, values in each.logprobs.items()}
    return found


def _loss(
    learner: "Learner",
    rollouts: Rollouts,
    batch: MicroBatch,
    step: Step,
    stored: Stored,
    read: tuple[Tensor, Tensor],
    room: ByRow,
) -> tuple[Tensor, Sums, ByRow]:
    """This micro-batch's loss, its part of the step's numbers, and the policy's log-probs.

    read: log-probs and entropies. Raises EngineError (exit 8) naming the rollouts with what is not finite.
    """
    logprobs_N, entropy_N = read
    own = by_row(batch, logprobs_N, room)
    if not bool(logprobs_N.isfinite().all()):
        # NaN reaches what it shares a sequence with, masked or not.
        own = _broken_alone(learner, rollouts, batch.rows.tolist()) or own
    given = given_of(learner.config, learner.objective, step, rollouts, batch, stored, own)
    try:
        loss, part = batch_loss(logprobs_N, entropy_N, given, learner.objective, step)
    except NotFiniteError as found:
        broken = batch.rows[found.rollouts].tolist()
        raise EngineError(f"{found} on {name_keys(rollouts, broken)}") from None
    if not math.isfinite(loss.item()):
        raise EngineError(f"update: the loss is {loss.item()} on {name_keys(rollouts, list(own))}")
    return loss, part, own


@torch.no_grad()
def _broken_alone(learner: "Learner", rollouts: Rollouts, rows: list[int]) -> ByRow:
    """Log-probs of those of `rows` that are not finite when each is read by itself."""
    room = room_for(rollouts, np.array(rows))
    for row in room:
        single = learner.network.batch(rollouts, [[tree_of(rollouts, [row])]])
        by_row(single, learner.network.logprobs(single)[0], room)
    return {row: values for row, values in room.items() if not np.isfinite(values).all()}


def _clip_gradient(
    learner: "Learner", rollouts: Rollouts, rows: np.ndarray, step: Step, stored: Stored
) -> float:
    """Norm of the gradient, which is then scaled down to max_grad_norm."""
    limit = learner.config.max_grad_norm or math.inf
    whole = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), limit)
    norm: float = (whole if learner.ranks is None else learner.ranks.full(whole)).item()
    if not math.isfinite(norm):
        broken = [row for row in rows if not _gradient_is_finite(learner, rollouts, row, step, stored)]
        raise EngineError(f"update: the gradient is {norm} on {name_keys(rollouts, broken or list(rows))}")
    return norm


def _gradient_is_finite(learner: "Learner", rollouts: Rollouts, row: int, step: Step, stored: Stored) -> bool:
    """Of one rollout by itself; of several processes all compute the same."""
    learner.optimizer.zero_grad(set_to_none=True)
    alone = np.array([row])
    batch = learner.network.batch(rollouts, [[tree_of(rollouts, [row])]])
    logprobs_N, entropy_N = learner.network.logprobs(batch, with_entropy=True)
    assert entropy_N is not None
    room = room_for(rollouts, alone)
    loss, _, _ = _loss(learner, rollouts, batch, step, stored, (logprobs_N, entropy_N), room)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    if learner.ranks is not None:
        gradients = [learner.ranks.local(gradient) for gradient in gradients]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    return finite if learner.ranks is None else not learner.ranks.any(not finite)
