"""The seconds in which an engine has little to do: what counts, and where it shows."""

import json
from pathlib import Path

import pytest
from tests.conftest import Grpo

from grpo.generate.engines.tail import Tail, is_tail

SETTINGS = ("--set", "iterations=1", "--set", "generate.max_new_tokens=48")


def parts(grpo: Grpo) -> dict[str, float]:
    query = "select part, seconds from timings where stage = 'generate'"
    code, out, err = grpo("sql", query, "--json")
    assert code == 0, err
    return {row["part"]: row["seconds"] for row in json.loads(out)}


def test_half_is_no_tail() -> None:
    assert [is_tail(busy, 4) for busy in range(5)] == [True, True, False, False, False]
    assert [is_tail(busy, 3) for busy in range(4)] == [True, True, False, False]
    assert not is_tail(1, 1)


def test_what_it_counts_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of whole seconds: blocks of one second, of which two are the tail."""
    now = iter(range(100))
    monkeypatch.setattr("grpo.generate.engines.tail.time.perf_counter", lambda: next(now))
    tail, seconds = Tail(), {"sample": 10.0}
    for busy in (4, 2):
        with tail.at(busy, 4):
            pass
    with tail.apart(seconds, "sample"):
        pass
    assert (tail.seconds, seconds) == (0.0, {"sample": 10.0})
    for _ in range(2):
        with tail.apart(seconds, "sample"), tail.at(1, 4):
            pass
    assert (tail.seconds, seconds) == (2, {"sample": 8, "tail": 2})


def test_responses_that_end_at_different_times_leave_a_tail(project: Path, grpo: Grpo) -> None:
    """Six samples of one batch: a response ends with its first letter, most of them long before the last."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    code, _, err = grpo("run", *SETTINGS, "--set", f"generate.stop={json.dumps(letters)}")
    assert code == 0, err
    found = parts(grpo)
    assert found["tail"] > 0
    assert found["sample"] > 0


def test_responses_of_one_length_leave_none(project: Path, grpo: Grpo) -> None:
    assert grpo("run", *SETTINGS, "--set", "generate.max_new_tokens=1")[0] == 0
    assert "tail" not in parts(grpo)


def test_of_engines_elsewhere_it_is_the_last_shards(project: Path, grpo: Grpo) -> None:
    """Three shards for three engines: under half of them are busy while the last shard alone is out."""
    engines = ("--set", "execution={engines: {count: 3}}", "--set", "generate.rollouts_per_shard=2")
    code, _, err = grpo("run", *SETTINGS, *engines)
    assert code == 0, err
    assert parts(grpo)["tail"] > 0
