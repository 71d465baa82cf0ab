"""chat: which chat template, with which variables, makes text of messages. rendering.py is where it works."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config import PromptsConfig
from grpo.config.named_files import named_text


@dataclass(frozen=True)
class Chat:
    """How messages become text. Example: Chat(None, {"enable_thinking": False})."""

    template: str | None = None
    """A Jinja template; None: the tokenizer's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the template is given besides the messages."""


def chat_of(config: PromptsConfig, folder: Path) -> Chat:
    """The chat template that `config` asks for. Raises UsageError (exit 2) where its file cannot be read."""
    key, name = "prompts.chat_template (a file with a Jinja template)", config.chat_template
    text = None if name is None else named_text(folder, key, name)
    return Chat(text, config.chat_template_arguments)
