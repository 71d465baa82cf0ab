from pathlib import Path
from typing import Any

import pytest

from grpo.config import PromptsConfig
from grpo.errors import DataError, UsageError
from grpo.models import starter_model
from grpo.prompts.chat import Chat, chat_of, encode, render

ROW: dict[str, Any] = {"prompt_id": 3, "prompt": None, "messages": [{"role": "user", "content": "Hi"}]}
# As models that may think have it: on unless it is turned off.
THINKING = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "<user>Hi<assistant>"),
        ({"enable_thinking": True}, "<user>Hi<assistant>"),
        ({"enable_thinking": False}, "<user>Hi<assistant><think></think>"),
    ],
)
def test_arguments_reach_the_template(arguments: dict[str, Any], text: str) -> None:
    tokenizer = starter_model.build_tokenizer()
    tokenizer.chat_template = THINKING
    texts, token_ids = encode([ROW], tokenizer, Chat(None, arguments))
    assert texts == [text]
    assert token_ids == [list(text.encode())]  # a token is a byte


def test_a_template_of_one_s_own_replaces_the_tokenizer_s(tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}?{{ tail }}\n")
    config = PromptsConfig(source="p.jsonl", chat_template="my.jinja", chat_template_arguments={"tail": "!"})
    chat = chat_of(config, tmp_path)
    assert chat == Chat("{{ messages[0].content }}?{{ tail }}\n", {"tail": "!"})
    tokenizer = starter_model.build_tokenizer()
    assert render(ROW, tokenizer, chat) == "Hi?!"  # Jinja leaves the last line end out
    assert render(ROW, tokenizer, Chat()) == "user: Hi\nassistant: "
    tokenizer.chat_template = None
    assert render(ROW, tokenizer, chat) == "Hi?!"


def test_text_goes_past_every_template() -> None:
    text = {"prompt": "1+1=", "messages": None}
    assert encode([text], starter_model.build_tokenizer(), Chat("never", {"unknown": 1}))[0] == ["1+1="]


@pytest.mark.parametrize(
    ("name", "hint"), [("enable_thinkng", "did you mean enable_thinking?"), ("zzz", "leave it out")]
)
def test_a_variable_that_the_template_does_not_know_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        encode([ROW], starter_model.build_tokenizer(), Chat(THINKING, {name: False}))
    message = f"prompts.chat_template_arguments: {name}: the chat template has no such variable; {hint}"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
    ],
)
def test_a_template_that_cannot_render_a_prompt_names_it(template: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        render(ROW, starter_model.build_tokenizer(), Chat(template))
    assert str(caught.value) == f"prompts: the chat template cannot render prompt 3: {reason}"


def test_a_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = PromptsConfig(source="p.jsonl", chat_template="my.jinja")
    not_utf8 = ":1:1: not UTF-8; save the file as UTF-8"
    for content, reason in ((None, ": no such file"), (b"\xff", not_utf8)):
        if content is not None:
            (tmp_path / "my.jinja").write_bytes(content)
        with pytest.raises(UsageError) as caught:
            chat_of(config, tmp_path)
        where = f"prompts.chat_template (a file with a Jinja template): {tmp_path}/my.jinja"
        assert str(caught.value) == f"{where}{reason}"


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_bytes(b"\xef\xbb\xbf{{ messages }}")
    config = PromptsConfig(source="p.jsonl", chat_template="my.jinja")
    assert chat_of(config, tmp_path).template == "{{ messages }}"
