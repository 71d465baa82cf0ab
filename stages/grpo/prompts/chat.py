"""chat: messages -> the text the model sees, through a chat template and its variables."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import PromptsConfig
from grpo.errors import DataError, InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Chat:
    """How messages become text. Example: Chat(None, {"enable_thinking": False})."""

    template: str | None = None
    """A Jinja template; None: the tokenizer's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the template is given besides the messages."""


def chat_of(config: PromptsConfig, folder: Path) -> Chat:
    """The chat template that `config` asks for. Raises UsageError (exit 2) where its file cannot be read."""
    path = template_path(config, folder)
    if path is None:
        return Chat(None, config.chat_template_arguments)
    try:
        return Chat(path.read_text(encoding="utf-8"), config.chat_template_arguments)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(
            f"prompts.chat_template: {path}: cannot be read: {reason}; a file with a Jinja template is needed"
        ) from None


def template_path(config: PromptsConfig, folder: Path) -> Path | None:
    """The configured file with a chat template, which may be missing; None: the tokenizer's own is used."""
    return None if config.chat_template is None else folder / config.chat_template


def render(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str:
    """The text the model sees: messages through the chat template, or the prompt as it is.

    Raises InputError (exit 4) where there is no template, DataError (exit 3) where it cannot render the row.
    """
    from jinja2 import TemplateError

    if row["messages"] is None:
        return str(row["prompt"])
    if chat.template is None and tokenizer.chat_template is None:
        raise InputError(
            "prompts: are chat messages, but the model's tokenizer has no chat template; give one:"
            " prompts.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=chat.template,
            tokenize=False,
            add_generation_prompt=True,
            **chat.arguments,
        )
    except (TemplateError, TypeError) as error:  # TypeError: an operation on a variable of the wrong type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"prompt {row['prompt_id']}" if "prompt_id" in row else "a prompt"
        raise DataError(f"prompts: the chat template cannot render {where}: {reason}") from None
    return str(text)


def check_arguments(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> None:
    """Raise UsageError (exit 2) for a variable that the template does not know: it would do nothing."""
    template = str(chat.template or tokenizer.chat_template)
    words = set(re.findall(r"[A-Za-z_]\w*", template))
    for name in chat.arguments:
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise UsageError(
                f"prompts.chat_template_arguments: {name}: the chat template has no such variable; {hint}"
            )
