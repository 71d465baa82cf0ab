"""first_read: the first log-probs that an update computes, against those that its rollouts were sampled with.

The weight check scores a few tokens before anything is sampled. This meets thousands, after it: an expert
that did not arrive, keys of an older policy in a prefix cache, rollouts of other weights than their manifest
says. It costs nothing, for both are there.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo.artifacts import ActiveRun, Manifest
from grpo.errors import EngineError
from grpo.models.weight_check import FLOAT32_TOLERANCE, ROUNDED_TOLERANCE
from grpo.update.batch import Rollouts
from grpo.update.layout import ByRow
from grpo.update.plan import OUTPUT

# Times what the weight check lets pass, and what was usual: sampled tokens may be far less likely.
_OF_TOLERANCE, _OF_USUAL, _NUM_USUAL = 10.0, 5.0, 20


class FirstRead:
    """Compares once, where the rollouts were sampled from the policy in memory and from its own distribution.

    precision: what the learner reads in.
    """

    def __init__(self, run: ActiveRun, iteration: int, rollouts: Rollouts, precision: str) -> None:
        self._run, self._iteration, self._rollouts, self._precision = run, iteration, rollouts, precision
        self._sampled = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
        policy = f"policy@{iteration}"
        is_of_policy = self._sampled.inputs.get(policy) == run.id_of(policy)
        self._is_due = is_of_policy and not changes_distribution(self._sampled.config["generate"])

    def __call__(self, logprobs: ByRow) -> None:
        """Take a micro-batch's log-probs of the policy. Raises EngineError (exit 8) where they are others.

        Older rollouts are passed over: their ratios have moved for good reason.
        """
        old, keys = self._rollouts.old_logprobs, self._rollouts.keys
        own = [row for row in logprobs if keys[row, 0] == self._iteration]
        if not self._is_due or not own:
            return
        self._is_due = False
        apart_N = np.concatenate([logprobs[row].astype(np.float64) - old[row] for row in own])
        difference = float(np.abs(apart_N).mean())
        tolerance = tolerance_of(self._sampled, self._precision)
        if tolerance is not None and difference <= _OF_TOLERANCE * tolerance:
            return  # as nearly always: no manifest of an earlier update is read
        at, engine = self._iteration, self._sampled.summary.get("precision")
        kind = (self._precision, self._run.config.update.weights, engine)
        limit = limit_of(tolerance, _usual(self._run, at, kind))
        if not difference <= limit:  # NaN is not
            raise EngineError(
                f"update {at}: the first log-probs are {difference:.1e} nats per token from what the rollouts"
                f" were sampled with, at most {limit:.1e} is right: the engine had other weights, or kept a"
                f" cache of them; `grpo doctor --model` measures it; `grpo generate --iteration {at} --force`"
                f" and `grpo run --from {at}` sample again; nothing was committed"
            )


def changes_distribution(generate: Mapping[str, Any]) -> bool:
    """Whether sampling cuts or changes the policy's distribution, by the `generate` of a manifest."""
    return (
        generate.get("top_p", 1) < 1
        or generate.get("top_k") is not None
        or generate.get("min_p", 0) > 0
        or generate.get("repetition_penalty", 1) != 1
        or generate.get("structured_outputs") is not None
    )


def tolerance_of(sampled: Manifest, precision: str) -> float | None:
    """What the weight check let pass, in nats per token; None where that says nothing of what is read."""
    found, apart = sampled.summary.get("precision"), sampled.summary.get("weight_check_difference")
    if precision != "float32":
        return None  # the weight check reads in float32
    if found == "float32":
        return FLOAT32_TOLERANCE
    return None if apart is None else max(FLOAT32_TOLERANCE, ROUNDED_TOLERANCE * apart)


def limit_of(tolerance: float | None, usual: float | None) -> float:
    """The most that is right, in nats per token; without either, anything: none says what rounding does."""
    if tolerance is None and usual is None:
        return math.inf
    return max(_OF_TOLERANCE * (tolerance or FLOAT32_TOLERANCE), _OF_USUAL * (usual or 0.0))


def _usual(run: ActiveRun, iteration: int, kind: tuple[Any, ...]) -> float | None:
    """Median of mismatch_mean over the last updates of a kind; None: there is none.

    kind: what learner, its weights and engine compute in; rounding is another for each.
    """
    known = []
    for number in range(max(0, iteration - _NUM_USUAL), iteration):
        update, rollouts = run.manifest(OUTPUT, number), run.manifest("rollouts", number)
        if update is not None and rollouts is not None:
            given, mean = update.config["update"], update.summary.get("mismatch_mean")
            computed = (
                given["precision"],
                given.get("weights", "float32"),
                rollouts.summary.get("precision"),
            )
            known += [mean] if mean is not None and computed == kind else []
    return statistics.median(known) if known else None
