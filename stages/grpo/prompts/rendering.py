"""rendering: prompts as the model sees them: messages through a chat template, then tokens.

A chat is rendered once, when its run begins, and its text is kept in `prompts`: what a template asks a clock
or chance for is asked once, and no iteration and no resumed shard can see another prompt.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import closing
from itertools import accumulate, groupby, takewhile
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pebble import ProcessExpired, ProcessPool

from grpo.errors import DataError, InputError, ResourceError, UsageError
from grpo.prompts import template_worker
from grpo.prompts.chat import Chat
from grpo.prompts.source import Row
from grpo.prompts.template_worker import Failure, Request
from grpo.tables import RENDERED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHATS_PER_CALL = 1000
_CHARACTERS_PER_CALL = 2**22  # of a tokenizer
TIMEOUT_S = 10.0  # of a chat; a millisecond is usual
_SPARE_S = 20.0  # of a call beside one chat that is slow
_POLL_S = 0.1  # how soon a signal is heard meanwhile


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
        self._stop = stop
        self._timeout_s = timeout_s
        self._pool: ProcessPool | None = None

    @property
    def template(self) -> str:
        """The chat template in force. Raises InputError (exit 4) where there is none."""
        if self.chat.template is None and self._tokenizer.chat_template is None:
            raise InputError(
                "prompts: are chat messages, but the model's tokenizer has no chat template; give one:"
                " prompts.chat_template"
            )
        return str(self._tokenizer.get_chat_template(self.chat.template, self.chat.arguments.get("tools")))

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
        while len(texts) < len(rows):
            some = rows[len(texts) : len(texts) + _CHATS_PER_CALL]
            found = self._call(some, [self._request(row["messages"], given, without) for row in some])
            if isinstance(found, Failure):
                raise _cannot(some[found.place : found.place + 1], found.reason)
            texts += found
        return texts

    def close(self) -> None:
        """End the process, busy or not."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()

    def _request(self, messages: list[Row], given: Mapping[str, Any], without: str) -> Request:
        # An answer that is begun is continued, as TRL does (apply_chat_template in trl/data_utils.py).
        begun = messages[-1]["role"] == "assistant"
        turn = {"add_generation_prompt": not begun, "continue_final_message": begun}
        values = {**self._tokenizer.special_tokens_map, **self.chat.arguments, **turn, **given}
        return Request(messages, {name: value for name, value in values.items() if name != without})

    def _call(self, rows: list[Row], requests: list[Request]) -> list[str] | Failure:
        if self._pool is None:
            # spawn: a fork of a process that has threads (torch, pyarrow) can deadlock.
            context, start = get_context("spawn"), template_worker.start
            self._pool = ProcessPool(max_workers=1, initializer=start, context=context)
        what, limit = (self.template, requests, self._timeout_s), self._timeout_s + _SPARE_S
        future = self._pool.schedule(template_worker.render, what, timeout=limit)
        while self._pool.active and not future.done():
            wait([future], timeout=_POLL_S)
            self._stop()
        if not future.done():
            raise ResourceError("prompts: the process for the chat template cannot be started")
        self._stop()  # a signal to all of a process group ends both
        try:
            found: list[str] | Failure = future.result()
        except TimeoutError:
            raise _cannot(rows, f"together they take more than {limit:g} s") from None
        except ProcessExpired as error:
            late = f"it takes more than {self._timeout_s:g} s, or ends its process (status {error.exitcode})"
            raise _cannot(rows, late) from None
        return found

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
    """Text and token ids of each prompt. Raises what Encoder.rows() does."""
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
