"""A run written by hand whose every number can be worked out in one's head; read it only."""

import pytest
from tests.inspect.report.runs import Row, make_run, row

from grpo.artifacts import Run


@pytest.fixture(scope="session")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two iterations of two groups of two."""
    rows = [
        row(0, 0, 0, "a", rewards={"right": 1.0, "short": 3.0}, reward=2.5, group_std=0.7, advantage=1.0),
        row(0, 0, 1, "abc", rewards={"right": 0.0, "short": 1.0}, reward=0.5, group_std=0.7, advantage=-1.0),
        row(0, 1, 0, "a", rewards={"right": 0.0, "short": 2.0}, reward=1.0, finish_reason="length"),
        row(0, 1, 1, "a", rewards={"right": 0.0, "short": None}, reward=None, keep=False, advantage=None,
            reason="unscored", policy_logprobs=None, error="no <b>number</b>"),
        row(1, 0, 0, "ab", rewards={"right": 1.0, "short": 2.0}, reward=2.0),
        row(1, 0, 1, "ab", rewards={"right": 1.0, "short": 2.0}, reward=2.0),
        row(1, 1, 0, "ab", prompt_id=2, rewards={"right": 1.0, "short": 2.0}, reward=2.0),
        row(1, 1, 1, "ab", prompt_id=2, rewards={"right": 0.0, "short": 2.0}, reward=1.0,
            finish_reason="length"),
    ]  # fmt: skip
    updates: list[Row] = [
        {"iteration": 0, "step": 0, "tokens": 900, "kl": 0.5, "entropy": 3.0, "skipped": True},
        {"iteration": 0, "step": 1, "tokens": 100, "kl": 0.25, "entropy": 2.0, "grad_norm": 2.0,
         "mismatch_mean": 1e-6, "clip_fraction_low": 0.0, "clip_fraction_high": 0.0},
        {"iteration": 0, "step": 2, "tokens": 300, "kl": 9.0, "entropy": 9.0, "grad_norm": 4.0,
         "clip_fraction_low": 0.1, "clip_fraction_high": 0.3},
        {"iteration": 1, "step": 0, "tokens": 400, "kl": None, "entropy": 1.0, "grad_norm": 1.0,
         "mismatch_mean": 2e-6, "clip_fraction_low": 0.0, "clip_fraction_high": 0.0},
    ]  # fmt: skip
    return make_run(tmp_path_factory.mktemp("hand"), rows, updates)
