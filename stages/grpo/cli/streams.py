"""cli.streams: stdin, stdout and stderr as the commands find them: open, and with one way to fail.

A disk that is full, a reader that went away, a descriptor that was closed: whoever prints need not know.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any

from grpo.errors import ResourceError

_NAMES = ("stdin", "stdout", "stderr")


class Output(io.FileIO):
    """stdout or stderr: the first write that fails ends the command, and later ones go nowhere."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed = False

    def write(self, data: Any) -> int:
        """Raises ResourceError (exit 7), or SystemExit where the reader went away: it has seen enough."""
        if not self._failed:
            try:
                return super().write(data)
            except BrokenPipeError:
                self._failed = True
                # Of a log that nobody reads any more the work is not done: as if by the signal.
                raise SystemExit(0 if self.fileno() == 1 else 141) from None
            except OSError as error:
                self._failed = True
                raise ResourceError(f"{_NAMES[self.fileno()]}: cannot be written: {error.strerror}") from None
        return memoryview(data).nbytes


def prepare() -> None:
    """Have the three be there, whatever the shell did with them, and take any text."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would be taken for it
            # Nothing to read, nowhere to put data; what is said to nobody is lost.
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
            os.set_inheritable(descriptor, True)  # by the workers
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the whole life of the process
    for descriptor in (1, 2):
        name = _NAMES[descriptor]
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is original:  # else somebody has put something of their own in its place
            text = io.TextIOWrapper(
                io.BufferedWriter(Output(descriptor)),
                encoding="utf-8" if stream is None else stream.encoding,
                errors="backslashreplace",
                line_buffering=descriptor == 2 or os.isatty(descriptor),
                write_through=stream is not None and stream.write_through,
            )
            setattr(sys, name, text)


def flush() -> None:
    """Write what is still in memory. Raises ResourceError (exit 7), SystemExit where nobody reads."""
    sys.stdout.flush()
    sys.stderr.flush()


def say_last(line: str) -> None:
    """A line on stderr, where that can still be written."""
    with suppress(ResourceError, SystemExit):
        print(line, file=sys.stderr, flush=True)
