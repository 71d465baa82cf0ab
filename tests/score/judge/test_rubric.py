from pathlib import Path
from typing import Any

import pytest

from grpo.config import JudgeConfig, RewardConfig
from grpo.errors import UsageError
from grpo.score.judge.rubric import question, read_score, rubric_of
from grpo.score.outcome import Outcome


def config(**keys: Any) -> JudgeConfig:
    shared = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "{response}"}
    return JudgeConfig.model_validate({**shared, **keys})


def reward(rubric: str) -> RewardConfig:
    return RewardConfig(judge=config(rubric=rubric))


# ---- the question ----


def test_placeholders_are_filled_and_other_braces_are_text() -> None:
    rubric = (
        'Task: {prompt} Right: {answer} ({level}) Got: {response}. As {"score": 7}, \\frac{1}{2}, {{word}}.'
    )
    found = question(rubric, "3+4=", "7", {"answer": "7", "level": 2})
    assert found == 'Task: 3+4= Right: 7 (2) Got: 7. As {"score": 7}, \\frac{1}{2}, {word}.'


def test_a_response_cannot_ask_for_the_answer() -> None:
    assert question("{response} {prompt}", "p", "{answer}", {"answer": "secret"}) == "{answer} p"


def test_messages_are_shown_with_their_roles() -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4="}]
    assert question("{prompt} -> {response}", messages, "7", {}) == "system: Add.\n\nuser: 3+4= -> 7"


def test_without_an_answer_a_rubric_that_wants_it_asks_nothing() -> None:
    assert question("{response} {answer}", "p", "7", {"answer": None}) is None
    assert question("{response}", "p", "7", {"answer": None}) == "7"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Rate {prompt}", "rubric: has no {response}, so every rollout would get the same question"),
        (
            "{response} {anwser}",
            "rubric: {anwser} is not a column; did you mean {answer}? ({{anwser}} is the text itself)",
        ),
        (
            "{response} {x}",
            "rubric: {x} is not a column; there are prompt, response, prompt_id, answer"
            " ({{x}} is the text itself)",
        ),
    ],
)
def test_a_placeholder_that_is_not_there(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        rubric_of(reward(text), Path(), ["prompt_id", "answer"])
    assert str(caught.value) == f"score.rewards: judge: {problem}"


def test_a_placeholder_of_a_column_without_a_value() -> None:
    rubric = reward("Is {response} like {answer}?")
    assert rubric_of(rubric, Path(), ["answer", "level"], {"level"})
    with pytest.raises(UsageError) as caught:
        rubric_of(rubric, Path(), ["answer", "level"], {"answer"})
    assert str(caught.value) == (
        "score.rewards: judge: rubric: asks for {answer}, and no row of the prompts has a value there;"
        " `prompts.columns.answer: NAME` says where it is"
    )


def test_a_rubric_is_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "rubric.md").write_text("Rate {response}\n")
    assert rubric_of(reward("rubric.md"), tmp_path) == "Rate {response}\n"
    text = "Rate {response} as in rubric.md"
    assert rubric_of(reward(text), tmp_path) == text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, ": no such file"),
        (b" \n", ": is empty; it holds the question to the judge"),
        (b"\xff\xfe", ":1:1: not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_rubric_file_that_is_no_use(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "rubric.md").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        rubric_of(reward("rubric.md"), tmp_path)
    assert str(caught.value) == f"score.rewards: judge: rubric {tmp_path}/rubric.md{problem}"


# ---- the answer ----


@pytest.mark.parametrize(
    ("keys", "answer", "outcome"),
    [
        ({}, "Good.\nScore: 7", Outcome(7.0, "ok")),
        ({}, "Score: -0.5  \nThat is all.", Outcome(-0.5, "ok")),
        ({}, "ok\r\nScore: 3\r\n", Outcome(3.0, "ok")),
        ({"pattern": "^(YES|NO)$", "grades": {"YES": 1.0}}, "Hm.\r\nYES\r\n", Outcome(1.0, "ok")),
        ({}, "Score: 7\nYes.\nScore: 7", Outcome(7.0, "ok")),  # twice the same
        ({"scale": [1.0, 5.0]}, "Score: 4", Outcome(0.75, "ok")),  # (4 - 1) / (5 - 1)
        ({"scale": [0.0, 10.0]}, "Score: 0", Outcome(0.0, "ok")),
        ({"pattern": r'"score": *([0-9]+)'}, '{"why": "x", "score": 3}', Outcome(3.0, "ok")),
        ({"pattern": "^(YES|NO)$", "grades": {"YES": 1.0, "NO": -1.0}}, "Hm.\nNO", Outcome(-1.0, "ok")),
    ],
)
def test_a_score_is_read(keys: dict[str, Any], answer: str, outcome: Outcome) -> None:
    assert read_score(config(**keys), answer) == outcome


@pytest.mark.parametrize(
    ("keys", "answer", "error"),
    [
        ({}, "I would say 7.", "has no score: 'I would say 7.'"),
        ({}, "The Score: 7", "has no score: 'The Score: 7'"),  # not a line of its own
        ({}, "Score: 7\nScore: 8", "gives 2 scores, 7, 8: 'Score: 7\\nScore: 8'"),
        ({}, "Score: 7/10", "has no score: 'Score: 7/10'"),
        ({"scale": [1.0, 5.0]}, "Score: 6", "says 6, outside 1 to 5: 'Score: 6'"),
        ({"pattern": "Score: (.*)"}, "Score: high", "says 'high', no number: 'Score: high'"),
        ({"pattern": "(.*)", "grades": {"YES": 1.0}}, "NO", "gives 2 scores, NO, : 'NO'"),
        ({"pattern": "(.+)", "grades": {"YES": 1.0}}, "NO", "says 'NO', no grade: 'NO'"),
        ({}, "x" * 200, "has no score: '" + "x" * 80 + "'..."),
    ],
)
def test_an_answer_that_cannot_be_read_is_an_error_never_a_number(
    keys: dict[str, Any], answer: str, error: str
) -> None:
    assert read_score(config(**keys), answer) == Outcome(None, "error", f"the judge's answer {error}")


def test_an_infinite_score_is_none() -> None:
    assert read_score(config(pattern="(.+)"), "inf") == Outcome(None, "nonfinite", "the judge gave inf")
