"""tail: the end of sampling, when most of what an engine can do at a time has nothing to do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

TAIL = "tail"
"""Part of the timings of generate and evaluate, beside `sample`."""


def is_tail(busy: int, slots: int) -> bool:
    """Whether under half of the slots are busy."""
    return 2 * busy < slots


class Tail:
    """Its seconds, since the engine was made."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def at(self, busy: int, slots: int) -> Iterator[None]:
        """Count a `with` block in which so many samples are under way, of as many as could be."""
        started = time.perf_counter()
        yield
        if is_tail(busy, slots):
            self.seconds += time.perf_counter() - started

    @contextmanager
    def apart(self, seconds: dict[str, float], part: str) -> Iterator[None]:
        """What it grows by in a `with` block is counted under its own name, and not under `part`."""
        before = self.seconds
        yield
        if grown := self.seconds - before:
            seconds[part] -= grown
            seconds[TAIL] = seconds.get(TAIL, 0.0) + grown
