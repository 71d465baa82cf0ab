"""chat: messages -> the text the model sees, through a chat template and its variables."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import PromptsConfig
from grpo.config.named_files import named_text
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
    key, name = "prompts.chat_template (a file with a Jinja template)", config.chat_template
    text = None if name is None else named_text(folder, key, name)
    return Chat(text, config.chat_template_arguments)


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
    given: dict[str, Any] = {"chat_template": chat.template, "tokenize": False, **chat.arguments}
    try:
        return str(tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, **given))
    except (TemplateError, TypeError) as error:  # TypeError: an operation on a variable of the wrong type
        problem = f"the chat template cannot render prompt {row['prompt_id']}: {first_line(error)}"
        raise DataError(f"prompts: {problem}") from None


def encode(
    rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", chat: Chat
) -> tuple[list[str], list[list[int]]]:
    """Text and token ids of each prompt. A chat template writes its own special tokens.

    Raises what render() does, and UsageError (exit 2) for a variable that the chat template does not know.
    """
    are_text = [row["messages"] is None for row in rows]
    if not all(are_text):
        _check_arguments(tokenizer, chat)
    texts = [render(row, tokenizer, chat) for row in rows]
    token_ids: dict[int, list[int]] = {}
    for kind in set(are_text):
        places = [place for place, is_text in enumerate(are_text) if is_text == kind]
        batch = tokenizer([texts[place] for place in places], add_special_tokens=kind, verbose=False)
        token_ids |= zip(places, batch.input_ids, strict=True)
    return texts, [token_ids[place] for place in range(len(rows))]


def _check_arguments(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> None:
    """Refuse a variable that the template does not know: it would do nothing."""
    words = set(re.findall(r"[A-Za-z_]\w*", str(chat.template or tokenizer.chat_template)))
    for name in sorted(chat.arguments.keys() - words):
        near = difflib.get_close_matches(name, words, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        problem = f"{name}: the chat template has no such variable; {hint}"
        raise UsageError(f"prompts.chat_template_arguments: {problem}")
