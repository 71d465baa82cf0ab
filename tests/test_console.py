import math
import signal
import threading
from typing import Any

import pytest
from rich.console import Console as RichConsole

from grpo.console import Console, finite, interval, iterations_text, number, table
from grpo.errors import listed


def test_a_cell_is_text_and_never_markup() -> None:
    console = RichConsole(width=60, color_system=None)
    with console.capture() as found:
        console.print(table(("name", "n"), [("[red]\x1b[1m", "1"), ("b", "22")], left=("name",)))
    lines = [line.strip() for line in found.get().splitlines()]
    assert lines[1].split() == ["name", "n"]
    assert lines[3:5] == [r"[red]\x1b[1m    1", "b              22"]


def test_numbers_and_iterations_in_words() -> None:
    assert (number(0.12345), number(0.5, ".1%"), number(None), number(None, absent="-")) == (
        *("0.123", "50.0%", "", "-"),
    )
    assert (interval(0.25, 0.5), interval(-1, 1, "+.1f"), interval(None, None)) == (
        *("0.250 to 0.500", "-1.0 to +1.0", ""),
    )
    assert (iterations_text([3]), iterations_text([3, 4, 7])) == ("iteration 3", "iterations 3 to 7")


def test_what_is_not_finite_is_null() -> None:
    assert finite({"a": [1.0, math.nan], "b": math.inf, "c": "x"}) == {"a": [1.0, None], "b": None, "c": "x"}


def test_a_signal_at_the_very_end_goes_to_the_handler_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sent while the handlers are being put back: neither lost, nor noted by work that has ended."""
    heard: list[int] = []
    real = signal.signal
    before = real(signal.SIGTERM, lambda number, _: heard.append(number))

    def late(number: signal.Signals, handler: Any) -> Any:
        # To this thread: of a process the system may take another, which libraries left behind.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return real(number, handler)

    try:
        with Console().signals():
            monkeypatch.setattr("grpo.console.signal.signal", late)
        assert heard == [signal.SIGTERM]
        assert capsys.readouterr().err == ""
    finally:
        real(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["b", "a"], "b, a"),
        (list("jihgfedcba"), "j, i, h, g, f, e, d, c, b, a"),
        ([*"abcdefghij", "near"], "near, a, e, b, c, d, f, g, h, i and 1 more"),
    ],
)
def test_names_in_a_message(names: list[str], text: str) -> None:
    assert listed(names, "neat") == text
