"""The reward of vs_trl.py, on both sides: the share of a response's tokens that are ASCII.

A model that finds all tokens about equally likely gives every group a spread of it.
"""

from typing import Any

FIRST_BEYOND_ASCII = 128


def share_of_ascii(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token < FIRST_BEYOND_ASCII for token in ids) / len(ids) for ids in completion_ids]
