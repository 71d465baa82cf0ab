"""A judge and what the environment holds for another endpoint, or what no connection can be made of."""

from pathlib import Path

import pytest
from tests.score.judge.endpoint import serve
from tests.score.judge.test_judge import KEY, ask, judge_of

from grpo.config import validated
from grpo.errors import UsageError

SECRET = "of-another-endpoint"
VARIABLES = {
    "OPENAI_API_KEY": SECRET,
    "OPENAI_ADMIN_KEY": SECRET,
    "OPENAI_ORG_ID": SECRET,
    "OPENAI_PROJECT_ID": SECRET,
    "OPENAI_WEBHOOK_SECRET": SECRET,
    "OPENAI_CUSTOM_HEADERS": f"authorization: {SECRET}\nX-Mine: {SECRET}\nUser-Agent-2: {SECRET}",
}


@pytest.mark.parametrize("key", [None, KEY])
def test_nothing_of_another_endpoint_is_sent(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serve() as endpoint:
        [found] = ask(judge_of(endpoint, api_key_env="JUDGE_KEY" if key else None), "a")
        [asked] = endpoint.asked
    sent = {name.lower(): value for name, value in asked.headers.items()}
    assert found.status == "ok"
    assert SECRET not in repr(sent)
    assert sent["authorization"] == f"Bearer {key or 'none'}"
    assert sent.keys() <= {
        "host",
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "user-agent",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "socks9://x"),
        ("ALL_PROXY", "http://[::1"),
        ("HTTPS_PROXY", "http://x:port"),
        ("HTTP_PROXY", "http://127.0.0.1:99999"),
        ("SSL_CERT_FILE", "/nonexistent"),
        ("SSL_CERT_FILE", "pyproject.toml"),
    ],
)
def test_an_environment_that_no_connection_can_be_made_of(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with serve() as endpoint, pytest.raises(UsageError, match=r"cannot be asked: .*from the environment"):
        judge_of(endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/v1",
        "http://host:99999/v1",
        "http://host:x/v1",
        "http://host:-1/v1",
        "http://host:0/v1",
        "http://:80/v1",
        "http://[x]/v1",
        "https://host/v1?key=sk-secret",
        "https://me:sk-secret@host/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "//host/v1",
    ],
)
def test_an_address_that_is_none(url: str) -> None:

    judge = {"url": url, "model": "m", "rubric": "{response}"}
    rewards = [{"name": "j", "judge": judge}]
    data = {"run": "x", "model": "m", "prompts": {"source": "arithmetic"}, "score": {"rewards": rewards}}
    with pytest.raises(UsageError, match=r"judge\.url: expected http\(s\)://host") as raised:
        validated(data, Path("pipeline.yaml"))
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:0", "http://a..b:1"])
def test_a_proxy_that_is_none_is_an_error_of_its_row(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with serve() as endpoint:
        [found] = ask(judge_of(endpoint, retries=0), "a")
        assert endpoint.asked == []
    assert found.status == "error"
