"""weight_sync: a policy on disk -> the engine, and the proof that the engine has it.

Stale weights are a bug that engines do have: a reload that reports success and leaves a copy behind. So
behaviour is compared, not bytes: the engine scores the policy's weight check before it samples.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from grpo.errors import EngineError
from grpo.generate.engines.protocol import Engine
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import PERTURBATION, WeightCheck, measure, write_perturbed

# Nats per token, mean; measured 1e-7 to 1e-6 for what is right, 0.01 and more for stale.
FLOAT32_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 3.0  # other precisions: times the disagreement on the freshly loaded starting policy


class WeightSync:
    """What the engine holds, and how far it may be from the learner. One for the life of an engine."""

    def __init__(
        self, engine: Engine, device: str, say: Callable[[str], None], attention: str = "auto"
    ) -> None:
        self.engine = engine
        self.is_open = False  # whether the engine has shown that it follows new weights
        self._device, self._attention = device, attention  # as load_model takes them
        self._say = say
        self._holds: str | None = None
        self._last: tuple[str, list[np.ndarray]] = ("", [])
        self._tolerance = FLOAT32_TOLERANCE

    def open(self, start: Path, check: WeightCheck, scratch: Path) -> None:
        """Load the starting policy, see how close the engine is, and make it follow a perturbed copy.

        The copy, as large as the checkpoint, stands in `scratch` for the while. Raises EngineError (exit 8)
        when the engine does not follow.
        """
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            perturbed = Path(name)
            write_perturbed(start, perturbed)
            moved = measure(Reader(load_model(perturbed, self._device, self._attention)), check.sequences)
            torch.cuda.empty_cache()  # the engine asks for most of it
            self.engine.load(start)
            fresh = check.difference(self.engine.logprobs(check.sequences))
            precision = self.engine.precision
            if precision != "float32":
                self._tolerance = max(FLOAT32_TOLERANCE, ROUNDED_TOLERANCE * fresh)
            self._check("the starting policy", fresh)
            # Or the tolerance would let an engine through that did not move at all.
            movement = check.difference([np.array(row) for row in moved.logprobs])
            if not self._tolerance < movement / 2:
                raise EngineError(
                    f"generate: the engine is {fresh:.1e} nats per token from the learner on the starting"
                    f" policy, and a change of every weight by {PERTURBATION:.0%} moves it by {movement:.1e}:"
                    " too far apart to tell stale weights; use another engine_options.dtype or quantization"
                    f" than {precision}"
                )
            self.engine.load(perturbed)
            scores = self.engine.logprobs(check.sequences)
            self._check("a perturbed copy", moved.difference(scores))
            self._last = ("", scores)
        if precision != "float32":
            apart = f"{fresh:.1e} nats per token from the learner's float32 on the starting policy"
            self._say(f"engine: {precision}, {apart}")
        self.is_open = True

    def bring(self, policy_id: str, checkpoint: Path, check: WeightCheck) -> float | None:
        """Have the engine hold policy `policy_id`; returns its disagreement with the learner.

        None: the engine holds it already. Raises EngineError (exit 8) when the engine's weights are stale.
        """
        if self._holds == policy_id:
            return None
        assert self.is_open, "open() comes before bring()"
        self._holds = None
        self.engine.load(checkpoint)
        scores = self.engine.logprobs(check.sequences)
        difference = check.difference(scores)
        self._check("the policy", difference)
        # Small steps in bfloat16 hide below any tolerance, but they never leave every bit as it was.
        last_id, last = self._last
        if last_id != policy_id and all(map(np.array_equal, last, scores)):
            raise EngineError(
                f"generate: the engine gives {checkpoint} the very log-probs of the policy before: its"
                " weights are stale; nothing was sampled"
            )
        self._holds, self._last = policy_id, (policy_id, scores)
        return difference

    def release(self) -> None:
        """Have the engine leave the accelerator; the next bring() loads again."""
        self._holds = None
        self.engine.release()

    def _check(self, what: str, difference: float) -> None:
        if not difference <= self._tolerance:  # NaN is not
            raise EngineError(
                f"generate: the engine does not compute {what} as the learner does: {difference:.1e} nats per"
                f" token apart, at most {self._tolerance:.1e} is right in {self.engine.precision}; its"
                " weights are stale or it is not the same model; nothing was sampled"
            )
