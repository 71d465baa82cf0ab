"""rows: rows of the user's source -> rows of the `prompts` table, each with its place for messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.config import PromptsConfig
from grpo.errors import DataError
from grpo.prompts.columns import ABSENT, MAX_CHARACTERS, find, paths, text_of
from grpo.prompts.source import Row, read_rows
from grpo.tables import RENDERED

# Keys of the tables, and what every reward function is passed: a column of the same name would be hidden.
_PASSED = ("prompts", "completions", "completion_ids")
_RESERVED = ("prompt_id", "iteration", "group_id", "sample_id", "run", RENDERED, *_PASSED)
_MOST_COLUMNS = 10_000
_ROLES = ("system", "user", "assistant", "tool")


def normalised(
    config: PromptsConfig, folder: Path, notes: list[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """(place, row) as the table has them, other columns as they are. Raises DataError with file and line.

    notes: gets a line for what of the configuration, or of the rows, had no effect, once all are read.
    """
    named = {key: name for key, name in config.columns.model_dump().items() if name not in (key, None)}
    found: dict[str, None] = {}
    held, texts, unused = set[str](), 0, 0
    for prompt_id, (place, row) in enumerate(read_rows(config, folder)):
        found |= dict.fromkeys(paths(row))
        held |= {key for key in named.keys() - held if find(row, named[key]) is not ABSENT}
        try:
            own = _normalise(row, config)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        is_text = isinstance(find(row, config.columns.prompt), str)
        texts += is_text and not _has_messages(row, config)
        unused += is_text and _has_messages(row, config)
        yield place, {"prompt_id": prompt_id, **own}
    for key in sorted(named.keys() - held if found else ()):
        problem = f"no column {named[key]}; found {', '.join(found)} (prompts.columns.{key})"
        raise DataError(f"prompts.source: {config.source}: {problem}")
    if notes is not None and config.chat and not texts:
        notes.append("chat: true has no effect: every prompt is a list of messages already")
    if notes is not None and unused:
        way = "columns.messages: null turns it round"
        notes.append(f"{config.columns.prompt} is not used in {unused:,} rows that have messages; {way}")


def _normalise(row: Row, config: PromptsConfig) -> Row:
    """The columns of the table but for prompt_id. Raises ValueError, saying what of the row is wrong."""
    if len(row) > _MOST_COLUMNS:
        raise ValueError(f"has {len(row):,} columns; {_MOST_COLUMNS:,} are the most")
    # SQL does not tell Run from run: the user's would be hidden behind the pipeline's.
    if reserved := [name for name in row if name.lower() in _RESERVED]:
        raise ValueError(f"column {reserved[0]} is the pipeline's own; give yours another name, such as id")
    names = config.columns.model_dump()
    prompt, messages = _prompt_and_messages(row, config)
    left_out = {"messages" if name is None else name for name in names.values()}
    others = {name: value for name, value in row.items() if name not in left_out}
    for name in others:
        if (key := name.lower()) in names:
            raise ValueError(
                f"column {name} has the name of one of the pipeline's own columns, but"
                f" prompts.columns.{key} is {names[key]}; say {key}: {name} there, or rename yours"
            )
    return {"prompt": prompt, "messages": messages, "answer": _answer(row, config.columns.answer), **others}


def _has_messages(row: Row, config: PromptsConfig) -> bool:
    name = config.columns.messages
    return name is not None and find(row, name) not in (None, ABSENT)


def _prompt_and_messages(row: Row, config: PromptsConfig) -> tuple[str | None, list[Row] | None]:
    """One of the two. Messages are in a column of theirs, or where the prompt is, as TRL has them."""
    columns, is_prompt = config.columns, not _has_messages(row, config)
    name = columns.prompt if is_prompt else str(columns.messages)
    found = find(row, name)
    if found is ABSENT:
        raise ValueError(f"no column {name}; found {', '.join(paths(row))} (prompts.columns.prompt)")
    chosen = columns.model_fields_set
    ask_which = not is_prompt and "prompt" in chosen and "messages" not in chosen
    if ask_which and find(row, columns.prompt) not in (None, ABSENT):
        raise ValueError(
            f"has a prompt in {columns.prompt} and messages in {name}; say which one is meant: set"
            " prompts.columns.messages: null, or leave prompts.columns.prompt out"
        )
    if is_prompt and not isinstance(found, list):
        if not isinstance(found, str) or not found.strip():
            raise ValueError(f"{name} is {found!r}; a prompt must be text that is not empty")
        _check_length(name, len(found))
        if not config.chat and config.system is None:
            return found, None
        found = [{"role": "user", "content": found}]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} must be a list of {{role, content}} that is not empty")
    messages = [_message(message) for message in found]
    _check_length(name, sum(len(message.get("content") or "") for message in messages))
    if config.system is None:
        return None, messages
    if messages[0]["role"] == "system":
        raise ValueError("begins with a system message of its own; leave prompts.system out")
    return None, [{"role": "system", "content": config.system}, *messages]


def _check_length(name: str, found: int) -> None:
    if found > MAX_CHARACTERS:
        raise ValueError(f"{name} has {found:,} characters; {MAX_CHARACTERS:,} are the most")


def _message(message: Any) -> Row:
    """A message with all its fields: they are the chat template's to read.

    One that is null is none: in Parquet every message has the fields of all. So has an assistant that only
    calls tools no content.
    """
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"a message must be {{role, content}} with role one of {', '.join(_ROLES)}")
    own: Row = _without_nulls(message)
    content = own.get("content")
    if isinstance(content, str) or (content is None and own.get("tool_calls")):
        return {key: own.pop(key) for key in ("role", "content") if key in own} | own
    found = type(content).__name__
    if isinstance(content, list):
        kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in content}
        found = f"a list of parts ({', '.join(sorted(kinds)) or 'none'}); images are not supported"
    raise ValueError(f"a message's content must be one text, found {found}")


def as_given(messages: list[Row]) -> list[Row]:
    """Messages as they came, of those that were read from the table, where each has the fields of all."""
    usual = ("role", "content")
    return [{key: each[key] for key in usual} | _without_nulls(each) for each in messages]


def _without_nulls(value: Any) -> Any:
    """A value without the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _answer(row: Row, name: str) -> str | None:
    found = find(row, name)
    try:
        return text_of(None if found is ABSENT else found)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
