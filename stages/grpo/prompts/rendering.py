"""rendering: prompts as the model sees them: messages through a chat template, then tokens.

A chat is rendered once, when its run begins, and its text is kept in `prompts`: what a template asks a clock
or chance for is asked once, and no iteration and no resumed shard can see another prompt.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import accumulate, groupby, takewhile
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo.errors import DataError, InputError, UsageError
from grpo.prompts.chat import Chat
from grpo.prompts.renderer import TIMEOUT_S, Renderer, template_of
from grpo.prompts.source import Row
from grpo.prompts.template_worker import Failure, Request
from grpo.tables import RENDERED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_CALL = 2**22  # of a tokenizer


class Encoder:
    """A tokenizer with its chat template, at work in a process that starts at the first chat; to be closed.

    stop: called while it is waited for; what it raises, such as Interrupted, ends the waiting. timeout_s: of
    one chat.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat: Chat,
        stop: Callable[[], None] = lambda: None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.chat = chat
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s
        self._renderer = Renderer(stop)

    @property
    def template(self) -> str:
        """The chat template in force. Raises InputError (exit 4) where there is none."""
        if self.chat.template is None and self._tokenizer.chat_template is None:
            raise InputError(
                "prompts: are chat messages, but the model's tokenizer has no chat template; give one:"
                " prompts.chat_template"
            )
        return template_of(self._tokenizer, self.chat.template, self.chat.arguments.get("tools"))

    def rows(self, rows: list[Row]) -> list[Row]:
        """The rows, each chat with its text; one that has its text keeps it.

        Raises UsageError (exit 2) for a variable that the chat template does not know, DataError (exit 3)
        where it cannot render a row, takes too long or too much memory.
        """
        chats = [row for row in rows if shown(row) is None]
        if chats:
            self._check_arguments()
        texts = iter(self.render(chats))
        return [row if shown(row) is not None else {**row, RENDERED: next(texts)} for row in rows]

    def token_ids(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of each prompt, whose text is there. A chat template writes its own special tokens."""
        return list(self._tokens(rows))

    def num_tokens(self, rows: list[Row]) -> Iterator[int]:
        """How many each has, counted as they are asked for: the tokens of many rows are not kept."""
        return map(len, self._tokens(rows))

    def _tokens(self, rows: list[Row]) -> Iterator[list[int]]:
        """Of some rows at a time: a tokenizer takes twenty times the memory of a text."""
        for is_text, members in groupby(rows, key=lambda row: row["messages"] is None):
            texts = [str(shown(row)) for row in members]
            while texts:
                fit = takewhile(_CHARACTERS_PER_CALL.__ge__, accumulate(map(len, texts)))
                count = max(1, sum(1 for _ in fit))
                batch = self._tokenizer(texts[:count], add_special_tokens=is_text, verbose=False)
                yield from batch.input_ids
                texts = texts[count:]

    def render(self, rows: list[Row], given: Mapping[str, Any] = {}, without: str = "") -> list[str]:
        """The text of each chat; given: variables in place of the usual, without: one that is left out."""
        texts: list[str] = []
        if not rows:
            return texts
        requests = (self._request(row["messages"], given, without) for row in rows)
        for found in self._renderer.render(self.template, requests, self._timeout_s):
            if isinstance(found, Failure):
                raise _cannot(rows[len(texts) : len(texts) + found.among], found.reason)
            texts.append(found)
        return texts

    def close(self) -> None:
        """End the process, busy or not."""
        self._renderer.close()

    def _request(self, messages: list[Row], given: Mapping[str, Any], without: str) -> Request:
        # An answer that is begun is continued, as TRL does (apply_chat_template in trl/data_utils.py).
        begun = messages[-1]["role"] == "assistant"
        turn = {"add_generation_prompt": not begun, "continue_final_message": begun}
        values = {**self._tokenizer.special_tokens_map, **self.chat.arguments, **turn, **given}
        return Request(messages, {name: value for name, value in values.items() if name != without})

    def _check_arguments(self) -> None:
        """Refuse a variable that the template does not know: it would do nothing."""
        words = set(re.findall(r"[A-Za-z_]\w*", self.template))
        for name in sorted(self.chat.arguments.keys() - words):
            near = difflib.get_close_matches(name, words, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            problem = f"{name}: the chat template has no such variable; {hint}"
            raise UsageError(f"prompts.chat_template_arguments: {problem}")


def shown(row: Row) -> str | None:
    """The text of a prompt as the model sees it; None for a chat that was not rendered."""
    text: str | None = row["prompt"] if row["messages"] is None else row.get(RENDERED)
    return text


def encode(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", chat: Chat, stop: Callable[[], None] = lambda: None
) -> tuple[list[str], list[list[int]]]:
    """Text and token ids of each prompt. UsageError (exit 2), DataError (3)."""
    with closing(Encoder(tokenizer, chat, stop)) as encoder:
        found = encoder.rows(rows)
        return [str(shown(row)) for row in found], encoder.token_ids(found)


def with_texts(
    prompts: pa.Table, tokenizer: "PreTrainedTokenizerBase", chat: Chat, stop: Callable[[], None]
) -> pa.Table:
    """The prompts table with the text of each; in runs of before it was kept, chats have none."""
    if RENDERED in prompts.column_names or prompts["messages"].null_count == len(prompts):
        return prompts
    with closing(Encoder(tokenizer, chat, stop)) as encoder:
        texts = [row.get(RENDERED) for row in encoder.rows(prompts.to_pylist())]
    return prompts.append_column(RENDERED, pa.array(texts, pa.string()))


def _cannot(rows: list[Row], reason: str) -> DataError:
    ids = [row.get("prompt_id", place) for place, row in enumerate(rows)]
    which = f"prompt {ids[0]}" if len(ids) == 1 else f"one of the prompts {ids[0]} to {ids[-1]}"
    return DataError(f"prompts: the chat template cannot render {which}: {reason}")
