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
    """(place, row) as the table has them, other columns as they are. Raises DataError with file and line."""
    found: dict[str, None] = {}
    for prompt_id, (place, row) in enumerate(read_rows(config, folder)):
        found |= dict.fromkeys(row)
        try:
            own = _normalise(row, config)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        yield place, {"prompt_id": prompt_id, **own}
    for key, name in config.columns.model_dump().items():
        if found and name != key and name not in found:  # named by the user
            problem = f"no column {name}; found {', '.join(found)} (prompts.columns.{key})"
            raise DataError(f"prompts.source: {config.source}: {problem}")


def _normalise(row: Row, config: PromptsConfig) -> Row:
    """The columns of the table but for prompt_id. Raises ValueError, saying what of the row is wrong."""
    # SQL does not tell Run from run: the user's would be hidden behind the pipeline's.
    if reserved := [name for name in row if name.lower() in _RESERVED]:
        raise ValueError(f"column {reserved[0]} is the pipeline's own; give yours another name, such as id")
    names = config.columns.model_dump()
    prompt, messages = _prompt_and_messages(row, config)
    others = {name: value for name, value in row.items() if name not in names.values()}
    for name in others:
        if (key := name.lower()) in names:
            raise ValueError(
                f"column {name} has the name of one of the pipeline's own columns, but"
                f" prompts.columns.{key} is {names[key]}; say {key}: {name} there, or rename yours"
            )
    return {"prompt": prompt, "messages": messages, "answer": _answer(row, config.columns.answer), **others}


def _prompt_and_messages(row: Row, config: PromptsConfig) -> tuple[str | None, list[Row] | None]:
    """One of the two. Messages are in a column of theirs, or where the prompt is, as TRL has them."""
    is_prompt = row.get(config.columns.messages) is None
    name = config.columns.prompt if is_prompt else config.columns.messages
    if name not in row:
        raise ValueError(f"no column {name}; found {', '.join(row)} (prompts.columns.prompt)")
    found = row[name]
    if is_prompt and not isinstance(found, list):
        if not isinstance(found, str) or not found.strip():
            raise ValueError(f"{name} is {found!r}; a prompt must be text that is not empty")
        if not config.chat and config.system is None:
            return found, None
        found = [{"role": "user", "content": found}]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} must be a list of {{role, content}} that is not empty")
    messages = [_message(message) for message in found]
    if config.system is None:
        return None, messages
    if messages[0]["role"] == "system":
        raise ValueError("begins with a system message of its own; leave prompts.system out")
    return None, [{"role": "system", "content": config.system}, *messages]


def _message(message: Any) -> Row:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"a message must be {{role, content}} with role one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    found = type(content).__name__
    if isinstance(content, list):
        kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in content}
        found = f"a list of parts ({', '.join(sorted(kinds)) or 'none'}); images are not supported"
    raise ValueError(f"a message's content must be one text, found {found}")


def _answer(row: Row, name: str) -> str | None:
    answer = row.get(name)
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int) or (isinstance(answer, float) and math.isfinite(answer)):
        return str(answer)
    found = answer if isinstance(answer, float) else type(answer).__name__
    raise ValueError(f"{name} must be text or a number, found {found}")
