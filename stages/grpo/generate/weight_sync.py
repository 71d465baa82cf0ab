"""weight_sync: a policy, in memory or on disk -> the engine, and the proof that the engine has it.

Stale weights are a bug that engines do have: a reload that reports success and leaves a copy behind. So
behaviour is compared, not bytes: the engine scores the policy's weight check before it samples.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from grpo.errors import EngineError
from grpo.generate.engines.protocol import Engine
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import (
    FLOAT32_TOLERANCE,
    PERTURBATION,
    ROUNDED_TOLERANCE,
    WeightCheck,
    measure,
    perturb,
)
from grpo.models.weights import Weights

_FEW_TOKENS = 4  # in which a change of every weight is looked for


class WeightSync:
    """What the engine holds, and how far it may be from the learner. One for the life of an engine."""

    def __init__(self, engine: Engine, say: Callable[[str], None], attention: str = "auto") -> None:
        self.engine = engine
        self.is_open = False  # whether the engine has shown that it follows new weights
        self.holds: str | None = None  # the id of the policy that the engine has
        self._attention = attention  # as load_model takes it
        self._say = say
        self._last: tuple[str, list[np.ndarray]] = ("", [])
        self._tolerance = FLOAT32_TOLERANCE

    def open(self, start: Path, check: WeightCheck) -> None:
        """Give the engine the starting policy, see how close it is, and prove that it follows new weights.

        The model is loaded once, and dropped. Raises EngineError (exit 8) when the engine does not follow.
        """
        model = load_model(start, self.engine.device, self._attention)
        weights = Weights(model, start)
        self.engine.take(weights)
        precision, few = self.engine.precision, check.first(_FEW_TOKENS)
        fresh = math.inf
        if precision == "float32":  # else the tolerance is measured, on as many tokens as later
            fresh = few.difference(self.engine.logprobs(few.sequences))
        if fresh <= self._tolerance:
            check = few
        else:  # rounding may move a few tokens much: all of them decide
            fresh = check.difference(self.engine.logprobs(check.sequences))
        if precision != "float32":
            self._tolerance = max(FLOAT32_TOLERANCE, ROUNDED_TOLERANCE * fresh)
        self._check("the starting policy", fresh)
        perturb(model)
        moved = measure(Reader(model, few=True), check.sequences)
        # Or the tolerance would let an engine through that did not move at all.
        movement = check.difference([np.array(row) for row in moved.logprobs])
        if not self._tolerance < movement / 2:
            raise EngineError(
                f"generate: the engine is {fresh:.1e} nats per token from the learner on the starting"
                f" policy, and a change of every weight by {PERTURBATION:.0%} moves it by {movement:.1e}:"
                " too far apart to tell stale weights; use another engine_options.dtype or quantization"
                f" than {precision}"
            )
        self.engine.take(weights)
        scores = self.engine.logprobs(check.sequences)
        self._check("a perturbed copy", moved.difference(scores))
        self._last = ("", scores)
        if precision != "float32":
            apart = f"{fresh:.1e} nats per token from the learner's float32 on the starting policy"
            self._say(f"engine: {precision}, {apart}")
        self.is_open = True

    def bring(self, policy_id: str, source: Path | Weights, check: WeightCheck) -> float | None:
        """Have the engine hold policy `policy_id`; returns its disagreement with the learner.

        None: the engine holds it already. Raises EngineError (exit 8) when the engine's weights are stale.
        """
        if self.holds == policy_id:
            return None
        assert self.is_open, "open() comes before bring()"
        self.holds = None
        if isinstance(source, Weights):
            self.engine.take(source)
        else:
            self.engine.load(source)
        return self.prove(policy_id, check, "the learner's policy" if isinstance(source, Weights) else source)

    def prove(self, policy_id: str, check: WeightCheck, name: object = "the learner's policy") -> float:
        """The same of weights that the engine has been given already; name: of them, for an error."""
        self.holds = None
        scores = self.engine.logprobs(check.sequences)
        difference = check.difference(scores)
        self._check("the policy", difference)
        # Small steps in bfloat16 hide below any tolerance, but they never leave every bit as it was.
        last_id, last = self._last
        if last_id != policy_id and all(map(np.array_equal, last, scores)):
            raise EngineError(
                f"generate: the engine gives {name} the very log-probs of the policy before: its"
                " weights are stale; nothing was sampled"
            )
        self.holds, self._last = policy_id, (policy_id, scores)
        return difference

    def release(self) -> None:
        """Have the engine leave the accelerator; the next bring() brings it anew."""
        self.holds = None
        self.engine.release()

    def _check(self, what: str, difference: float) -> None:
        if not difference <= self._tolerance:  # NaN is not
            raise EngineError(
                f"generate: the engine does not compute {what} as the learner does: {difference:.1e} nats per"
                f" token apart, at most {self._tolerance:.1e} is right in {self.engine.precision}; its"
                " weights are stale or it is not the same model; nothing was sampled"
            )
