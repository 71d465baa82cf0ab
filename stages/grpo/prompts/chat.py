"""chat: messages -> the text the model sees, through a chat template and its variables."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import PromptsConfig
from grpo.config.named_files import read_text
from grpo.errors import DataError, InputError, UsageError, first_line

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
    text = (
        None
        if path is None
        else read_text(path, f"prompts.chat_template (a file with a Jinja template): {path}")
    )
    return Chat(text, config.chat_template_arguments)


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
        where = f"prompt {row['prompt_id']}" if "prompt_id" in row else "a prompt"
        raise DataError(f"prompts: the chat template cannot render {where}: {first_line(error)}") from None
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


def encode(
    rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", chat: Chat
) -> tuple[list[str], list[list[int]]]:
    """Text and token ids of each prompt. A chat template writes its own special tokens.

    Raises what render() does, and UsageError (exit 2) for a variable that the chat template does not know.
    """
    if chat.arguments and any(row["messages"] is not None for row in rows):
        check_arguments(tokenizer, chat)
    texts = [render(row, tokenizer, chat) for row in rows]
    token_ids: list[list[int]] = [[] for _ in rows]
    for is_text in (True, False):
        places = [place for place, row in enumerate(rows) if (row["messages"] is None) == is_text]
        if places:
            batch = tokenizer(
                [texts[place] for place in places], add_special_tokens=is_text, padding=False, verbose=False
            )
            for place, ids in zip(places, batch.input_ids, strict=True):
                token_ids[place] = list(ids)
    return texts, token_ids
