"""console: what a person sees while something works. Everything goes to stderr; data goes to stdout."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from grpo.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress
    from rich.table import Table

PLAIN_WIDTH = 120  # columns of a table that goes to a file or a pipe
_PLAIN_INTERVAL_S = 15.0  # without a terminal: a line now and then, so that a log stays readable
_BARS = "▁▂▃▄▅▆▇█"


def quieten_libraries() -> None:
    """Before they are imported: no warnings of torch's own, and no word of what is done to the hub."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class Advance(Protocol):
    """advance(count, note): count more units are done; `note` stands in place of their rate."""

    def __call__(self, count: int, note: str = "") -> None:
        """Show it."""


class Console:
    """Lines and progress bars. Bars only where stderr is a terminal; else a plain line now and then."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self._signal: int | None = None
        self.is_urgent = False  # whether a second signal came: what is under way is given up

    def say(self, line: str) -> None:
        """Print one line; control characters in it are made visible."""
        if not self.quiet:
            print(printable(line), file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar with rate and ETA over `total` units; yields advance(n, note). Gone when it ends."""
        done, started = 0, time.perf_counter()
        said = started
        with _bar(title, total, unit) if self.terminal else nullcontext() as bar:

            def advance(count: int, note: str = "") -> None:
                nonlocal done, said
                done, now = done + count, time.perf_counter()
                rate = done / max(now - started, 1e-9)
                note = note or f"{rate:,.0f}/s"
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=done, note=note)
                elif now - said >= _PLAIN_INTERVAL_S:
                    said = now
                    left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
                    self.say(f"{title}: {done:,}/{total:,} {unit}, {note}{left}")

            yield advance

    def is_stopping(self) -> bool:
        """Whether a signal came that asks to stop: nothing new should be begun."""
        return self._signal is not None

    def stop_requested(self) -> None:
        """Raise Interrupted when such a signal came; stages call it between shards."""
        if self._signal is not None:
            raise Interrupted(self._signal)

    def confirm(self, text: str) -> bool:
        """Print `text` and ask whether to go on; a signal ends the waiting at once."""
        print(f"{printable(text)}\ncontinue? [y/N] ", end="", file=sys.stderr, flush=True)

        def stop(number: int, frame: FrameType | None) -> None:
            raise Interrupted(number)

        with _handled_by(stop):
            try:
                return input().strip().lower() in ("y", "yes")
            except EOFError:
                return False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGHUP ends the work after the current shard, the second at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                self.is_urgent = True
                raise Interrupted(number)
            self._signal = number
            text = "stopping after the current shard; once more to stop now"
            try:
                self.say(text)
            except (
                RuntimeError
            ):  # it came in the middle of a write to stderr, which Python does not begin anew
                with suppress(OSError):
                    os.write(2, f"{text}\n".encode())

        with _handled_by(note):
            yield


@contextmanager
def terminations() -> Iterator[None]:
    """Outside of work, SIGTERM and SIGHUP are Interrupted too: no command ends without a word."""

    def end(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise Interrupted(number)

    of_ctrl_c = signal.getsignal(signal.SIGINT)
    with _handled_by(end):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, of_ctrl_c)  # a KeyboardInterrupt, as ever
        yield


def ignore_signals() -> None:
    """From here on the command ends: another signal would cut off what it has to say."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _bar(title: str, total: int, unit: str) -> "Progress":
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
        transient=True,
    )
    bar.add_task(title, total=total, note="")
    return bar


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone: whoever called from another one has them
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it: the work outlives its terminal
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        # One that comes meanwhile waits, and goes to the handler before. Python drops a signal that was noted
        # for a handler that is gone when it looks.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number, handler_before in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # else the command ends, and so says its exit code
                signal.signal(number, handler_before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def stdout_console() -> "RichConsole":
    """Where tables are printed: as wide as the terminal, or PLAIN_WIDTH columns where there is none.

    Text is text: brackets are no markup, and numbers have no colour of their own.
    """
    from rich.console import Console as RichConsole

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return RichConsole(width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def paged(pager: bool) -> Iterator["RichConsole"]:
    """The same; on a terminal through the user's pager, or less, which stops only for what does not fit."""
    console = stdout_console()
    os.environ.setdefault("LESS", "FRX")  # F: what fits is only printed; R: colours; X: it stays there
    with (
        console.pager(styles=True) if pager and sys.stdin.isatty() and sys.stdout.isatty() else nullcontext()
    ):
        yield console


def table(
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    left: Collection[str] = (),
    title: str | None = None,
    plain: bool = False,
) -> "Table":
    """A table to print. A cell is shown as text, never as markup, unless it is something of rich.

    left: columns that are aligned to the left. plain: no line below the header.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    style = {"box": None, "header_style": "dim"} if plain else {"box": box.SIMPLE_HEAD}
    found = Table(title=title, title_justify="left", pad_edge=False, **style)
    for name in columns:
        side: Any = "left" if name in left else "right"
        found.add_column(Text(printable(name)), justify=side, overflow="fold")
    for row in rows:
        found.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return found


def number(value: float | None, form: str = ".3f", absent: str = "") -> str:
    """A number in a form such as `.3f`; `absent` where it is null."""
    return absent if value is None else format(value, form)


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """`0.250 to 0.500`; empty where it is not known."""
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def iterations_text(numbers: Sequence[int]) -> str:
    """`iteration 3`, or `iterations 3 to 5` for the first and the last of several."""
    first, last = numbers[0], numbers[-1]
    return f"iteration {first}" if first == last else f"iterations {first} to {last}"


def finite(value: Any) -> Any:
    """`value`, or what it lists, with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sparkline(values: list[float | None], low: float | None = None, high: float | None = None) -> str:
    """A curve in one line of text, a space where a value is null; from `low` to `high`, or its own range."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    bottom = min(known) if low is None else low
    top = max(known) if high is None else high
    step = (top - bottom) / (len(_BARS) - 1) or 1.0
    return "".join(" " if value is None else _BARS[round((value - bottom) / step)] for value in values)


def thinned(rows: list[Any], count: int) -> list[Any]:
    """At most `count` of `rows` at even distances, the first and the last among them."""
    if len(rows) <= count:
        return rows
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def printable(text: str) -> str:
    """`text` with control characters (ESC, BEL, ...) made visible; newline and tab stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)
