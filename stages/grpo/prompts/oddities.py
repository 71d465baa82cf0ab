"""oddities: what is strange about prompts that can be used: a line each, for `run` and `doctor` to say.

What a chat template does is found by its effect: a chat is rendered with something and without it.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from grpo.errors import DataError
from grpo.prompts.columns import paths
from grpo.prompts.rendering import Encoder, shown
from grpo.prompts.source import Row

_SAMPLES = 8  # chats that are rendered otherwise to see what changes
_SHOWN = 60  # characters of a prompt in a message
_NO_TEXT = re.compile(r"n/?a|nan|null|none|nil", re.IGNORECASE)
_LIKE_FLOAT = re.compile(r"-?[0-9]+\.0")
_LIKE_ANSWER = re.compile(r"(\w*[_.])?(answers?|ground_truth|solution|target|label|reference)(\[.*)?", re.I)


class Oddities:
    """Rows as they are read; lines() is what was found. Of chats whose text is not there it is less."""

    def __init__(self) -> None:
        self._answers: dict[int, str | None] = {}  # hash of a text -> the first answer it came with
        self._contrary: dict[int, tuple[str, dict[str, None]]] = {}  # the same -> what is asked, its answers
        self._count: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()  # role -> chats in which text of such a message is missing
        self._candidates: dict[str, None] = {}
        self._chats: list[Row] = []  # the first
        self._with_field: dict[str, list[Row]] = {}  # field of a message -> the first chats that have it

    def add(self, rows: list[Row]) -> None:
        """Take note of some rows."""
        for row in rows:
            self._count["rows"] += 1
            self._add_answer(row)
            if row["messages"] is not None:
                self._count["chats"] += 1
                self._count["begun"] += row["messages"][-1]["role"] == "assistant"
                if (text := shown(row)) is not None:
                    self._add_chat(row, text)

    def lines(self, encoder: Encoder | None) -> list[str]:
        """One for each thing that is odd; encoder: renders some of the chats otherwise."""
        found = [self._duplicates(), *self._of_answers(), *self._of_messages()]
        if encoder is not None and self._chats:
            found += self._of_template(encoder)
        return [line for line in found if line]

    def _add_answer(self, row: Row) -> None:
        answer, key = row["answer"], hash(shown(row) or str(row["messages"]))
        first = self._answers[key] = self._answers.get(key) or answer
        if answer and first and answer != first:
            _, answers = self._contrary.setdefault(key, (_asked(row), {first: None}))
            answers[answer] = None
        if answer is None:
            self._count["unanswered"] += 1
            if self._count["unanswered"] == self._count["rows"] <= _SAMPLES:
                own = {
                    name: value for name, value in row.items() if name not in ("prompt", "messages", "answer")
                }
                self._candidates |= dict.fromkeys(filter(_LIKE_ANSWER.fullmatch, paths(own)))
        elif not answer.strip():
            self._count["empty"] += 1
        elif _NO_TEXT.fullmatch(answer):
            self._count[f"is {answer}"] += 1
        elif _LIKE_FLOAT.fullmatch(answer):
            self._count["like 3.0"] += 1

    def _add_chat(self, row: Row, text: str) -> None:
        messages = row["messages"]
        if len(self._chats) < _SAMPLES:
            self._chats.append(row)
        self._dropped.update(
            {message["role"] for message in messages if (message.get("content") or "").strip() not in text}
        )
        for field in {name for message in messages for name in message} - {"role", "content"}:
            if len(chats := self._with_field.setdefault(field, [])) < _SAMPLES:
                chats.append(row)

    def _duplicates(self) -> str:
        rows, distinct = self._count["rows"], len(self._answers)
        if rows == distinct:
            return ""
        line = f"{rows:,} rows, {distinct:,} distinct prompts"
        if self._contrary:
            asked, answers = next(iter(self._contrary.values()))
            line += f"; {asked} has answers {' and '.join(list(answers)[:3])}"
            more = len(self._contrary) - 1
            line += f", and {more:,} more have several" if more else ""
        return line

    def _of_answers(self) -> list[str]:
        count, rows, found = self._count, self._count["rows"], []
        if 0 < count["unanswered"] < rows:
            found.append(f"{count['unanswered']:,} of {rows:,} rows have no answer")
        elif count["unanswered"] and self._candidates:
            names = ", ".join(list(self._candidates)[:5])
            found.append(f"no row has an answer; columns.answer may name {names}")
        if count["empty"]:
            found.append(f"{count['empty']:,} of {rows:,} answers are empty text, which is not a missing one")
        for name in [name for name in count if name.startswith("is ")]:
            text = name.removeprefix("is ")
            found.append(
                f"{count[name]:,} of {rows:,} answers are the text {text}; leave it empty where there is none"
            )
        if count["like 3.0"]:
            found.append(
                f"{count['like 3.0']:,} of {rows:,} answers are text like 3.0; a response 3 is another"
            )
        return found

    def _of_messages(self) -> list[str]:
        count, chats = self._count, self._count["chats"]
        found = [
            f"the chat template leaves text of {role} messages out, in {number:,} of {chats:,} chats"
            for role, number in self._dropped.items()
        ]
        if count["begun"]:
            found.append(
                f"{count['begun']:,} of {chats:,} chats end in an assistant message: it is continued"
            )
        return found

    def _of_template(self, encoder: Encoder) -> list[str]:
        """What of messages and configuration the template does not look at, and what it should not."""
        found = []
        open_ended = [row for row in self._chats if row["messages"][-1]["role"] != "assistant"]
        if open_ended and _same(encoder, open_ended, {"add_generation_prompt": False}):
            found.append(
                "the chat template gives the same text with and without add_generation_prompt: nothing says"
                " that the assistant is next"
            )
        for field, chats in sorted(self._with_field.items()):
            bare = [{**row, "messages": [_without(field, each) for each in row["messages"]]} for row in chats]
            if _same(encoder, bare):
                found.append(f"field {field} of messages has no effect: the chat template does not show it")
        for name, value in encoder.chat.arguments.items():
            if _same(encoder, self._chats, without=name):
                found.append(f"chat_template_arguments.{name}: {value} changes nothing in these prompts")
        if "strftime_now" in encoder.template:
            found.append("the chat template asks for the time: it is that of now, in UTC, for the whole run")
        return found


def _asked(row: Row) -> str:
    """What a prompt asks, in a few characters: its text, or the last message of a user."""
    users = [message["content"] for message in row["messages"] or () if message["role"] == "user"]
    text = " ".join(str(users[-1] if users else row["prompt"]).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _without(field: str, message: Row) -> Row:
    return {name: value for name, value in message.items() if name != field}


def _same(encoder: Encoder, rows: list[Row], given: Mapping[str, Any] = {}, without: str = "") -> bool:
    """Whether chats give the text that they have given, changed as they are or with other variables."""
    try:
        return encoder.render(rows, given, without) == [shown(row) for row in rows]
    except DataError:  # so the template needs what is not there
        return False
