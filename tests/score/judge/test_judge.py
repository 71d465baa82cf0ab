"""The judge's client against an endpoint of ours; a real vLLM server is in test_judge_vllm.py."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from tests.score.judge.endpoint import Endpoint, Reply, fails, says, serve

from grpo.config import RewardConfig
from grpo.errors import UsageError
from grpo.score.judge.client import MAX_FAILURES_IN_A_ROW, Judge
from grpo.score.judge.completion import Judgement
from grpo.score.outcome import Key

KEY = "sk-0123456789abcdef"


def judge_of(endpoint: Endpoint, timeout_s: float = 20.0, **keys: Any) -> Judge:
    config = {"url": endpoint.url, "model": "judge-1", "rubric": "{response}", "retries": 2, **keys}
    reward = RewardConfig.model_validate({"judge": config, "timeout_s": timeout_s})
    return Judge(reward, "{response}")


def by_key(questions: Iterable[str]) -> dict[Key, str]:
    return {(0, place): question for place, question in enumerate(questions)}


def ask(judge: Judge, *questions: str) -> list[Judgement]:
    """The judgements in the order of the questions; the judge is closed then."""
    try:
        batches = list(judge.ask(by_key(questions), lambda: False))
    finally:
        judge.close()
    found = {key: judgement for batch in batches for key, judgement in batch.items()}
    return [found[key] for key in by_key(questions)]


# ---- the request ----


def test_the_request_is_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serve() as endpoint:
        extra = {"top_p": 0.5, "structured_outputs": {"regex": "Score: [0-9]"}}
        judge = judge_of(endpoint, extra_body=extra, max_tokens=9, api_key_env="JUDGE_KEY")
        [found] = ask(judge, "Rate 1+1=2")
    assert found == Judgement("ok", "Score: 1", None, "judge-1", "stop", 7, 3, 1)
    [asked] = endpoint.asked
    message = {"role": "user", "content": "Rate 1+1=2"}
    assert asked.request == {
        **{"model": "judge-1", "messages": [message], "temperature": 0.0, "max_tokens": 9},
        **{"top_p": 0.5, "structured_outputs": {"regex": "Score: [0-9]"}},
    }
    assert asked.headers["authorization"] == f"Bearer {KEY}"


def test_null_is_not_sent() -> None:
    with serve() as endpoint:
        ask(judge_of(endpoint, temperature=None, max_tokens=None), "a")
    assert sorted(endpoint.asked[0].request) == ["messages", "model"]


# ---- what is repeated ----


@pytest.mark.parametrize(
    "first", [fails(500), fails(503), fails(429, Retry_After="0.1"), Reply(drops=True), Reply(hangs=True)]
)
def test_what_may_pass_is_asked_again(first: Reply) -> None:
    replies = iter([first, says("Score: 4")])
    with serve(lambda question, request: next(replies)) as endpoint:
        [found] = ask(judge_of(endpoint, timeout_s=1.0), "a")
    assert (found.status, found.answer, found.attempts) == ("ok", "Score: 4", 2)


def test_retry_after_is_waited_for() -> None:
    replies = iter([fails(429, Retry_After="2"), says("Score: 4")])
    started = time.monotonic()
    with serve(lambda question, request: next(replies)) as endpoint:
        ask(judge_of(endpoint), "a")
    assert time.monotonic() - started > 2  # by itself it would have waited half a second


def test_a_hang_ends_and_is_a_timeout() -> None:
    started = time.monotonic()
    with serve(lambda question, request: Reply(hangs=True)) as endpoint:
        [found] = ask(judge_of(endpoint, timeout_s=0.5, retries=1), "a")
    assert found == Judgement("timeout", error="no answer within 0.5 s")
    assert len(endpoint.asked) == 2
    assert time.monotonic() - started < 15


def test_what_is_refused_is_not_repeated_and_the_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    refusal = fails(401, f"Incorrect API key provided: {KEY}.\x1b[31m")
    with serve(lambda question, request: refusal) as endpoint:
        [found] = ask(judge_of(endpoint, api_key_env="JUDGE_KEY"), "a")
    assert len(endpoint.asked) == 1
    assert found.status == "error"
    assert found.error is not None
    assert found.error.startswith("Error code: 401 - ")
    assert "Incorrect API key provided: ***." in found.error
    assert KEY not in found.error
    assert "\x1b" not in found.error


# ---- what comes back ----


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (says(None, refusal="I must not."), "an empty answer (it refused: I must not.)"),
        (says(""), "an empty answer (ended by stop)"),
        (Reply(body=b'{"choices": []}'), "not a chat completion: "),
        (Reply(body=b"[1]"), "not a chat completion: "),
        (Reply(body=b"{"), "not a chat completion: {"),
        (Reply(body=b"[" * 100_000), "not a chat completion: [[["),
        (Reply(body=b'{"choices": "none"}'), "not a chat completion: "),
        (Reply(body=b'{"choices": [{"message": null}]}'), "not a chat completion: "),
        (
            Reply(body=b'{"choices": [{"message": {"content": [{"type": "text", "text": "Score: 3"}]}}]}'),
            "not a chat completion: ",
        ),
        (
            Reply(body=b"<html>", headers={"content-type": "text/html"}),
            "not a chat completion: <html>",
        ),
    ],
)
def test_what_is_no_answer_is_an_error_of_its_row(reply: Reply, error: str) -> None:
    with serve(lambda question, request: reply) as endpoint:
        [found] = ask(judge_of(endpoint), "a")
    assert (found.status, found.answer) == ("error", None)
    assert str(found.error).startswith(error)


def test_what_utf_8_cannot_hold_becomes_a_question_mark() -> None:
    body = says("Score: 1 @").body.replace(b"@", b"\\ud800")
    with serve(lambda question, request: Reply(body=body)) as endpoint:
        [found] = ask(judge_of(endpoint), "a")
    assert found.answer == "Score: 1 ?"


@pytest.mark.parametrize(
    ("beside", "stored"),
    [
        ({"model": None, "usage": None}, (None, "stop", None, None)),
        (
            {"model": 7, "usage": {"prompt_tokens": "abc", "completion_tokens": 4}},
            (None, "stop", None, 4),
        ),
        (
            {"model": "m", "usage": {"prompt_tokens": 2**40, "completion_tokens": -1.5}},
            ("m", "stop", None, None),
        ),
        ({"model": "m", "usage": [1, 2]}, ("m", "stop", None, None)),
    ],
)
def test_nonsense_beside_an_answer_is_null(
    beside: dict[str, Any], stored: tuple[str | None, str, int | None, int | None]
) -> None:
    body = json.dumps({**json.loads(says("Score: 1").body), **beside}).encode()
    with serve(lambda question, request: Reply(body=body)) as endpoint:
        [found] = ask(judge_of(endpoint), "a")
    assert found == Judgement("ok", "Score: 1", None, *stored, 1)


# ---- many at once ----


def test_no_more_than_concurrency_are_under_way() -> None:
    lock = threading.Lock()
    now = most = 0

    def answer(question: str, request: dict[str, Any]) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return says("Score: 1")

    with serve(answer) as endpoint:
        ask(judge_of(endpoint, concurrency=3), *map(str, range(12)))
    assert most == 3


def test_requests_per_minute_hold_for_repeated_ones_too() -> None:
    begun: list[float] = []

    def answer(question: str, request: dict[str, Any]) -> Reply:
        begun.append(time.monotonic())
        return fails(500) if len(begun) == 1 else says("Score: 1")

    with serve(answer) as endpoint:
        ask(judge_of(endpoint, requests_per_minute=600), *map(str, range(10)))
    # 600 a minute are one every 0.1 s: 11 requests take 1.0 s at least.
    assert len(begun) == 11
    assert begun[-1] - begun[0] > 0.95


def test_after_many_failures_in_a_row_the_rest_is_not_asked() -> None:
    with serve(lambda question, request: fails(401)) as endpoint:
        found = ask(judge_of(endpoint, concurrency=2), *map(str, range(100)))
    assert MAX_FAILURES_IN_A_ROW <= len(endpoint.asked) <= MAX_FAILURES_IN_A_ROW + 1  # one was under way
    assert {judgement.status for judgement in found} == {"error"}
    assert found[-1].error in [
        f"not asked, since {number} requests in a row failed"
        for number in (MAX_FAILURES_IN_A_ROW, MAX_FAILURES_IN_A_ROW + 1)
    ]


def test_questions_that_are_refused_for_themselves_do_not_stop_the_others() -> None:
    with serve(lambda question, request: fails(400, "too long")) as endpoint:
        ask(judge_of(endpoint, concurrency=2), *map(str, range(60)))
    assert len(endpoint.asked) == 60


def test_stopping_ends_at_once() -> None:
    with serve(
        lambda question, request: says("Score: 1") if question == "a" else Reply(hangs=True)
    ) as endpoint:
        judge = judge_of(endpoint, concurrency=2, timeout_s=600)
        started = time.monotonic()
        batches = judge.ask(by_key("abcdefgh"), lambda: time.monotonic() > started + 2)
        found = [judgement for batch in batches for judgement in batch.values()]
        judge.close()
    assert [judgement.status for judgement in found] == ["ok"]
    assert len(endpoint.asked) == 3
    assert time.monotonic() - started < 10


def test_connections_stay_open_between_calls() -> None:
    with serve() as endpoint:
        judge = judge_of(endpoint, concurrency=1)
        for text in "abc":
            [batch] = judge.ask(by_key(text), lambda: False)
            assert {key: found.answer for key, found in batch.items()} == {(0, 0): "Score: 1"}
        judge.close()


def test_who_has_enough_leaves_nothing_under_way() -> None:
    def answer(question: str, request: dict[str, Any]) -> Reply:
        return says("Score: 1") if question == "a" else Reply(hangs=True)

    with serve(answer) as endpoint:
        judge = judge_of(endpoint, concurrency=2)
        batches = judge.ask(by_key("abc"), lambda: False)
        assert list(next(batches)) == [(0, 0)]
        started = time.monotonic()
        batches.close()
        judge.close()
    assert time.monotonic() - started < 5


# ---- what is missing ----


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with serve() as endpoint, pytest.raises(UsageError) as caught:
        judge_of(endpoint)
    assert str(caught.value).startswith(
        "score.rewards: judge: a judge needs the package openai (import of openai"
    )
    assert str(caught.value).endswith("; pip install 'grpo-stages[judge]'")


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serve() as endpoint, pytest.raises(UsageError) as caught:
        judge_of(endpoint, api_key_env="JUDGE_KEY")
    assert str(caught.value) == ("score.rewards: judge: api_key_env: JUDGE_KEY is not set in the environment")


def test_within_an_event_loop_as_in_a_notebook() -> None:
    async def cell(endpoint: Endpoint) -> list[Judgement]:
        return ask(judge_of(endpoint), "a", "b")

    with serve() as endpoint:
        assert [judgement.status for judgement in asyncio.run(cell(endpoint))] == ["ok", "ok"]
