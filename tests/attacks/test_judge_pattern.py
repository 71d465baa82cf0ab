"""A judge's pattern is the user's and the answer a model's: together they may not hang."""

import time

import pytest

from grpo.config import JudgeConfig
from grpo.score.judge.rubric import PATTERN_S, read_score

HANGS = [  # of `re`, for longer than anybody waits
    (r"(?:a+)+b(x)", "a" * 40),
    (r"^(a+)+$", "a" * 40 + "b"),
    (r"(?:a|aa)+b(x)|(?:)c", "a" * 60),
    (r"(?:.*?,){25}P(x)", "1," * 60),
    (r"(?:\w+\s?)*:(x)", "word " * 30 + "!"),
    (r"(?=(?:a+)+b)(x)", "a" * 40),
    (r"(a?){40}a{40}", "a" * 39),
]


@pytest.mark.parametrize(("pattern", "answer"), HANGS)
def test_a_pattern_ends(pattern: str, answer: str) -> None:
    config = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "{response}", "pattern": pattern}
    started = time.monotonic()
    found = read_score(JudgeConfig.model_validate(config), answer)
    assert time.monotonic() - started < PATTERN_S + 5
    assert (found.value, found.status) == (None, "error")
    assert found.error is not None
    assert "has no score" in found.error or "keeps the pattern busy for more than 1 s" in found.error
