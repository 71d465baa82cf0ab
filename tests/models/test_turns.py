"""What stays on a GPU while others have their turn, in numbers."""

from typing import Any

import pytest

from grpo.models.turns import SHARE, SPARE_BYTES, may_stay, share_of

GB = 10**9
H200 = 141 * GB


@pytest.mark.parametrize(
    ("held", "share", "stays"),
    [
        (0, SHARE, True),
        (16 * 0.6, SHARE, True),  # 0.6B: weights, two moments and a reference in float32; 0.15 of 141 are 21
        (16 * 1.5, SHARE, False),  # 1.5B: 24 of 21
        (16 * 1.5, 0.8, True),  # 28 of it are left, less what is spare
        (14 * 7.6, SHARE, False),  # 7B with a reference in bfloat16: 106
        (14 * 7.6, 0.2, True),
        (0.04 * 7.6 + 2 * 7.6, SHARE, True),  # of an adapter the moments are nothing; its base in bfloat16
    ],
)
def test_it_stays_where_the_others_have_their_share(held: float, share: float, stays: bool) -> None:
    assert may_stay(H200 - int(held * GB), H200, share) is stays


def test_the_last_byte() -> None:
    free = H200 // 2 + SPARE_BYTES
    assert may_stay(free, H200, 0.5)
    assert not may_stay(free - 1, H200, 0.5)


def test_what_other_processes_hold_counts() -> None:
    assert not may_stay(H200 // 2, H200, 0.5)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, SHARE),
        ({"gpu_memory_utilization": 0.3, "max_num_seqs": 8}, 0.3),
        ({"gpu_memory_utilization": "0.3"}, SHARE),  # vLLM refuses it when it opens
    ],
)
def test_the_share_is_the_engines(options: dict[str, Any], share: float) -> None:
    assert share_of(options) == share
