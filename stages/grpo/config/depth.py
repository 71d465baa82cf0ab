"""config.depth: how deep lists and mappings may be nested: whoever walks them must come to an end."""

from typing import Any


def check_depth(value: Any, most: int) -> None:
    """Raise ValueError for lists and mappings nested more than `most` deep, or that hold themselves."""
    if _is_deeper(value, most):
        raise ValueError(f"nested more than {most} deep")


def _is_deeper(value: Any, left: int) -> bool:
    """Whether more than `left` levels are there; none further in is looked at."""
    if not isinstance(value, dict | list | tuple):
        return False
    if left == 0:
        return True
    return any(
        _is_deeper(child, left - 1) for child in (value.values() if isinstance(value, dict) else value)
    )
