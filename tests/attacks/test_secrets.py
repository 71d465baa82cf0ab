"""Keys and passwords in what a reward has of its own: refused before they are written anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from grpo.config import load
from grpo.errors import UsageError

MODEL = "run: r\nmodel: tiny-arithmetic\nprompts: {source: arithmetic}\n"
JUDGE = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "{response}"}
SECRETS: list[tuple[dict[str, Any], str]] = [
    *[
        ({name: "value"}, f".{name}")
        for name in (
            *[
                "api_key",
                "apikey",
                "API_KEY",
                "api-key",
                "apiKey",
                "openai_api_key",
                "secret_key",
                "secret",
                "token",
            ],
            *["password", "db_password", "passwd", "hf_token", "access_token", "auth_token", "authorization"],
            *[
                "client_secret",
                "credentials",
                "private_key",
                "Authorization",
                "bearer",
                "X-Api-Key",
                "cookie",
            ],
        )
    ],
    ({"client": {"options": {"api_key": "value"}}}, ".client.options.api_key"),
    ({"clients": [{"api_key": "value"}]}, ".clients.api_key"),
    ({"auth": "sk-abcdefghijklmnopqrstuvwx"}, ".auth"),
    ({"auth": "sk-proj-abcdefghijklmnopqrstuvwx"}, ".auth"),
    ({"names": ["a", "hf_abcdefghijklmnopqrstuvwx"]}, ".names"),
    ({"repo": "ghp_abcdefghijklmnopqrstuvwxyz0123456789"}, ".repo"),
    ({"aws": "AKIAABCDEFGHIJKLMNOP"}, ".aws"),
    ({"header": "Bearer abcdefghijklmnop"}, ".header"),
    ({"url": "postgres://user:word@127.0.0.1/db"}, ".url"),
    ({"jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc"}, ".jwt"),
]
HARMLESS: list[Any] = [
    *[
        {"max_tokens": 8},
        {"eos_token": "</s>"},
        {"api_key_env": "JUDGE_KEY"},
        {"key": "answer"},
        {"tokenizer": "x"},
    ],
    *[
        {"url": "http://127.0.0.1:8000/v1"},
        {"pattern": "sk-.*"},
        {"api_key": None},
        {"author": "me"},
        {"pass_rate": 1},
    ],
    *[{"token_ids": [1]}, {"passages": ["a"]}, {"secretary": "x"}, {"stop_token": "x"}, {"keys": ["a", "b"]}],
]


def read(folder: Path, reward: dict[str, Any]) -> None:
    (folder / "pipeline.yaml").write_text(MODEL + f"score: {{rewards: [{json.dumps(reward)}]}}\n")
    load(folder / "pipeline.yaml")


@pytest.mark.parametrize("kind", ["arguments", "judge.extra_body"])
@pytest.mark.parametrize(("values", "place"), SECRETS)
def test_a_secret_is_refused_and_not_shown(
    tmp_path: Path, kind: str, values: dict[str, Any], place: str
) -> None:
    own = (
        {"function": "m:f", "arguments": values}
        if kind == "arguments"
        else {"judge": {**JUDGE, "extra_body": values}}
    )
    with pytest.raises(UsageError) as caught:
        read(tmp_path, own)
    message = str(caught.value)
    assert f"score.rewards[0].{kind}{place}: looks like a key or a password" in message
    assert 'os.environ["NAME"]' in message
    assert "abcdef" not in message
    assert "user:word" not in message


@pytest.mark.parametrize("values", HARMLESS)
def test_what_is_none_is_taken(tmp_path: Path, values: dict[str, Any]) -> None:
    read(tmp_path, {"function": "m:f", "arguments": values})
