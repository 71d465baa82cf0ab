"""ranges: what `--iteration` says: a number, a range, or all."""

import re

from grpo.errors import UsageError


def parse_range(wanted: str) -> tuple[int, int] | None:
    """First and last of `3` or `0-19`; None for `all`. Raises UsageError (exit 2) for anything else."""
    if wanted == "all":
        return None
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", wanted)
    if not match:
        raise UsageError(f"--iteration {wanted}: expected a number such as 3, a range such as 0-19, or all")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise UsageError(f"--iteration {wanted}: ends before it begins; did you mean {last}-{first}?")
    return first, last
