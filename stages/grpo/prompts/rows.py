"""rows: rows of the user's source -> rows of the `prompts` table, each with its place for messages."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.config import PromptsConfig
from grpo.errors import DataError
from grpo.prompts.source import Row, read_rows

# Keys of the tables, and what every reward function is passed: a column of the same name would be hidden.
_PASSED = ("prompts", "completions", "completion_ids")
_RESERVED = ("prompt_id", "iteration", "group_id", "sample_id", "run", *_PASSED)
_ROLES = ("system", "user", "assistant", "tool")


def normalised(config: PromptsConfig, folder: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of the source with prompt_id, prompt, messages, answer, and every other column as it is.

    `folder`: what a path in `config` is relative to. Raises DataError (exit 3) naming file and line.
    """
    named = {key: name for key, name in config.columns.model_dump().items() if name != key}  # by the user
    found: dict[str, None] = {}
    for prompt_id, (place, row) in enumerate(read_rows(config, folder)):
        found |= dict.fromkeys(row)
        yield place, {"prompt_id": prompt_id, **_normalise(place, row, config)}
    if found and (absent := [key for key, name in named.items() if name not in found]):
        raise DataError(
            f"prompts.source: {config.source}: no column {named[absent[0]]}; found {', '.join(found)}"
            f" (prompts.columns.{absent[0]})"
        )


def _normalise(place: str, row: Row, config: PromptsConfig) -> Row:
    # SQL does not tell Run from run: the user's would be hidden behind the pipeline's.
    if reserved := [name for name in row if name.lower() in _RESERVED]:
        raise DataError(
            f"{place}: column {reserved[0]} is the pipeline's own; give yours another name, such as id"
        )
    names = config.columns
    prompt, messages = None, _messages(place, row, config)
    if messages is None:
        prompt = _prompt(place, row, names.prompt)
        if config.chat or config.system is not None:
            messages, prompt = [{"role": "user", "content": prompt}], None
    if config.system is not None and messages is not None:
        if messages[0]["role"] == "system":
            raise DataError(f"{place}: begins with a system message of its own; leave prompts.system out")
        messages = [{"role": "system", "content": config.system}, *messages]
    others = {name: row[name] for name in row if name not in names.model_dump().values()}
    if clash := [name for name in others if name.lower() in ("prompt", "messages", "answer")]:
        key = clash[0].lower()
        raise DataError(
            f"{place}: column {clash[0]} has the name of one of the pipeline's own columns, but"
            f" prompts.columns.{key} is {getattr(names, key)}; say {key}: {clash[0]} there, or rename yours"
        )
    answer = _answer(place, names.answer, row.get(names.answer))
    return {"prompt": prompt, "messages": messages, "answer": answer, **others}


def _prompt(place: str, row: Row, name: str) -> str:
    if name not in row:
        raise DataError(f"{place}: no column {name}; found {', '.join(row)} (prompts.columns.prompt)")
    prompt = row[name]
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    raise DataError(f"{place}: {name} is {prompt!r}; a prompt must be text that is not empty")


def _messages(place: str, row: Row, config: PromptsConfig) -> list[Row] | None:
    """The messages of a row, in a column of theirs or as a conversational data set of TRL has them."""
    name, prompt = config.columns.messages, config.columns.prompt
    if row.get(name) is None:
        if not isinstance(row.get(prompt), list):
            return None
        name = prompt
    if not isinstance(row[name], list) or not row[name]:
        raise DataError(f"{place}: {name} must be a list of {{role, content}} that is not empty")
    return [_message(place, message) for message in row[name]]


def _message(place: str, message: Any) -> Row:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise DataError(f"{place}: a message must be {{role, content}} with role one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    found = type(content).__name__
    if isinstance(content, list):
        kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in content}
        found = f"a list of parts ({', '.join(sorted(kinds)) or 'none'}); images are not supported"
    raise DataError(f"{place}: a message's content must be one text, found {found}")


def _answer(place: str, name: str, answer: Any) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int) or (isinstance(answer, float) and math.isfinite(answer)):
        return str(answer)
    found = answer if isinstance(answer, float) else type(answer).__name__
    raise DataError(f"{place}: {name} must be text or a number, found {found}")
