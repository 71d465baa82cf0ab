from pathlib import Path

import pytest

from grpo.config import PromptsConfig
from grpo.errors import UsageError
from grpo.prompts.chat import Chat, chat_of


def test_a_template_and_its_variables(tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}?{{ tail }}\n")
    config = PromptsConfig(source="p.jsonl", chat_template="my.jinja", chat_template_arguments={"tail": "!"})
    assert chat_of(config, tmp_path) == Chat("{{ messages[0].content }}?{{ tail }}\n", {"tail": "!"})
    assert chat_of(PromptsConfig(source="p.jsonl"), tmp_path) == Chat()


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
