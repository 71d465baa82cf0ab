"""GRPO in thirty lines, as docs/math.md has it, against the loss that the learner computes."""

from typing import Any

import pytest
import torch
from tests.pages.pages import DOCS, blocks

from grpo.config.objectives import OBJECTIVES
from grpo.update.given import Given, Objective, Step
from grpo.update.objective import batch_loss


def test_the_thirty_lines_are_the_objective_grpo() -> None:
    page = (DOCS / "math.md").read_text()
    [text] = [block.text for block in blocks(page) if block.title == "grpo.py"]
    assert len(text[text.index("def ") :].splitlines()) <= 30
    found: dict[str, Any] = {}
    exec(compile(text, "docs/math.md", "exec"), found)

    draw = torch.Generator().manual_seed(0)
    lengths_B, advantages_B = torch.tensor([3, 1, 5]), torch.tensor([0.9, -1.2, -0.4], dtype=torch.float64)
    old_N = -3 * torch.rand(9, generator=draw, dtype=torch.float64)
    reference_N = old_N + 0.3 * torch.randn(9, generator=draw, dtype=torch.float64)
    logprobs_N = (old_N + 0.3 * torch.randn(9, generator=draw, dtype=torch.float64)).requires_grad_()
    parts = [torch.split(values, lengths_B.tolist()) for values in (logprobs_N, old_N, reference_N)]
    expected = found["grpo_loss"](list(zip(*parts, advantages_B.tolist(), strict=True)))
    [expected_gradient] = torch.autograd.grad(expected, logprobs_N)

    keys = {key: value for key, value in OBJECTIVES["grpo"]["update"].items() if key != "old_logprobs"}
    given = Given(lengths_B, advantages_B.repeat_interleave(lengths_B), old_N, reference_N)
    loss, part = batch_loss(logprobs_N, torch.zeros(9), given, Objective(**keys), Step(3, 9, 8))
    [gradient] = torch.autograd.grad(loss, logprobs_N)
    assert part.clipped_low + part.clipped_high > 0  # the clip acts in this example
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert gradient.tolist() == pytest.approx(expected_gradient.tolist(), rel=1e-13)
