"""memory: a limit to what reading a file of others may take: a hundred bytes can stand for gigabytes."""

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from grpo.errors import DataError

MEMORY_BYTES = 3 * 2**30  # address space beside what the process has; ordinary rows take a thousandth
_STATE = Path("/proc/self/statm")
Item = TypeVar("Item")


def within_memory(where: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made in at most MEMORY_BYTES. Raises DataError (exit 3), beginning with `where`."""
    source = iter(items)
    while True:
        try:
            with _limited():
                item = next(source)
        except StopIteration:
            return
        except MemoryError:
            message = f"takes more than {MEMORY_BYTES / 2**30:g} GiB of memory to read; prompts are smaller"
            raise DataError(f"{where}: {message}") from None
        yield item


@contextmanager
def _limited() -> Iterator[None]:
    """Within, the process gets MEMORY_BYTES more and no more; not where the system keeps no such limit."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        now = int(_STATE.read_text().split()[0]) * resource.getpagesize()
        limits = (now + MEMORY_BYTES, *(each for each in before if each != resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
