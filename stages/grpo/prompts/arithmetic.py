"""arithmetic: the built-in task, one-digit sums "0+0=" to "9+9=".

GRPO never draws twenty of them, evaluation does: by a rule, so every machine and version holds out the same.
"""

from typing import Any


def training_rows() -> list[dict[str, Any]]:
    """Return the 80 sums that GRPO draws from, {"prompt": "3+4=", "answer": "7"}, ordered by their digits."""
    return _rows(held_out=False)


def held_out_rows() -> list[dict[str, Any]]:
    """Return the 20 sums for evaluation; each digit stands twice on the left and twice on the right."""
    return _rows(held_out=True)


def _rows(held_out: bool) -> list[dict[str, Any]]:
    # 2 has an inverse modulo 5, so each digit is held out with exactly two partners on either side.
    # The remainder 1 leaves 0+0 and 1+9 in training. Only there do the sum ("0", "10") and the two digits
    # side by side ("00", "19") begin alike, so what the starter model must unlearn is its second token,
    # and no other prompt teaches that.
    sums = [(a, b) for a in range(10) for b in range(10) if ((b - 2 * a) % 5 == 1) == held_out]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
