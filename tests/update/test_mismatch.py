"""The mismatch columns, worked out by hand."""

import math

import numpy as np
import pytest

from grpo.update.mismatch import mismatch


def test_mismatch_by_hand() -> None:
    # d = ln 3, 0 | -ln 3, ln 1.5: w = 3, 1, 1/3, 1.5
    a, b = math.log(3), math.log(1.5)
    policy = [np.array([-1.0 + a, -2.0]), np.array([-2.0 - a, -1.0 + b])]
    old = [np.array([-1.0, -2.0]), np.array([-2.0, -1.0])]
    found = mismatch(zip(policy, old, strict=True))
    assert found == {
        "mismatch_mean": pytest.approx((2 * a + b) / 4),
        "mismatch_max": pytest.approx(a),
        "mismatch_kl": pytest.approx((2 - a + 0 + (1 / 3 - 1 + a) + 0.5 - b) / 4),  # mean of w - 1 - ln w
        # (35 / 6)^2 / (4 * (9 + 1 + 1 / 9 + 9 / 4)) = (1225 / 36) / (445 / 9) = 1225 / 1780
        "effective_sample_size": pytest.approx(1225 / 1780),
        "over_cap_fraction": 0.25,  # of 3, 1, 1/3 and 1.5 only 3 is over 2
    }
    assert mismatch(zip(policy, old, strict=True), cap=1.2)["over_cap_fraction"] == 0.5  # 3 and 1.5


def test_no_mismatch() -> None:
    same = [np.array([-1.0, -2.0], dtype=np.float32)]
    assert mismatch(zip(same, same, strict=True)) == {
        "mismatch_mean": 0,
        "mismatch_max": 0,
        "mismatch_kl": 0,
        "effective_sample_size": 1,
        "over_cap_fraction": 0,
    }


def test_mismatch_of_policies_with_nothing_in_common_is_finite() -> None:
    found = mismatch([(np.array([-1.0, -900.0, -1.0]), np.array([-900.0, -1.0, -1.0]))])
    assert all(math.isfinite(value) for value in found.values())
    assert found["effective_sample_size"] == pytest.approx(1 / 3)  # one weight outweighs all
    assert found["over_cap_fraction"] == pytest.approx(1 / 3)
