"""prompts: the user's rows -> the `prompts` table, once per run; and which of them an iteration draws."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Product, Run, Staging, id_of, is_hub_id
from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.config.prompts import BUILT_IN
from grpo.errors import DataError, InputError, UsageError
from grpo.prompts.chat import Chat, chat_of, check_arguments, render, template_path
from grpo.prompts.source import Row, read_rows, source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUTPUT = "prompts"
HELD_OUT = "eval_prompts"
STAGE_VERSION = 2  # 2: the summary holds the longest prompt
_ROWS_PER_SHARD = 100_000
_MAX_DEPTH = 32  # of a column; a Parquet schema of more than 100 levels, two for each list, cannot be read
# Keys of the tables, and what every reward function is passed: a column of the same name would be hidden.
_RESERVED = (
    "prompt_id",
    "iteration",
    "group_id",
    "sample_id",
    "run",
    "prompts",
    "completions",
    "completion_ids",
)
_ROLES = ("system", "user", "assistant", "tool")


def config_of(run: Run, output: str = OUTPUT) -> PromptsConfig:
    """The section that describes `prompts` or, with `evaluate` configured, `eval_prompts`."""
    if output == OUTPUT:
        return run.config.prompts
    assert run.config.evaluate is not None, "there are no held-out prompts without `evaluate`"
    return run.config.evaluate.prompts


def plan(run: Run, output: str = OUTPUT, kept: Manifest | None = None) -> Plan:
    """What the prompts of this run depend on. Raises DataError (exit 3) when the source is missing.

    kept: the prompts of a run that has begun. What they were made from is then not asked for again where it
    is gone, or is on the hub, which holds what others put there. A name that was not read is missing.
    """
    config = config_of(run, output)
    sources = {}
    was_read = kept is not None and kept.summary.get("source") == config.source
    if kept is not None and ((was_read and source_is_gone(run, output)) or is_on_hub(config, run.imports)):
        sources = {name: sha256 for name, sha256 in kept.user_files.items() if name == "prompts.source"}
    elif found := source_digest(config, run.imports):
        sources = {"prompts.source": found}
    if path := template_path(config, run.imports):
        chat_of(config, run.imports)  # says so where the file cannot be read
        sources["prompts.chat_template"] = sha256_of(path)
    return Plan(output, STAGE_VERSION, output, None, {"prompts": described(run, output)}, {}, sources)


def described(run: Run, output: str = OUTPUT) -> dict[str, Any]:
    """All that counts of a section; of a file or folder it is the content, not the name."""
    config = config_of(run, output)
    by_content = config.source not in BUILT_IN and (
        source_is_gone(run, output) or not is_on_hub(config, run.imports)
    )
    return config.model_dump(exclude={"source"} if by_content else set())


def is_on_hub(config: PromptsConfig, folder: Path) -> bool:
    """Whether the source is a data set on the hub."""
    return config.source not in BUILT_IN and not config.is_file and is_hub_id(config.source, folder)


def source_is_gone(run: Run, output: str = OUTPUT) -> bool:
    """Whether the file or folder with the prompts is not there.

    A folder that is gone looks like the name of a data set on the hub, but for what the run says it read.
    """
    config = config_of(run, output)
    if config.source in BUILT_IN or (run.imports / config.source).exists():
        return False
    if not is_on_hub(config, run.imports):
        return True
    manifest = run.manifest(output, None)
    return (
        manifest is not None
        and manifest.summary.get("source") == config.source
        and "source" not in manifest.config["prompts"]
    )


def prepare(
    run: Run,
    staging: Staging,
    num_tokens: Callable[[list[Row]], list[int]],
    room: int | None,
    expected: str | None = None,
) -> Manifest:
    """Write and commit `prompts`, or `eval_prompts`: the output of the plan that is staged.

    `num_tokens` gives the length of each row's prompt as the model sees it; `room` is the longest that leaves
    space for max_new_tokens (None: the model has no limit). Raises DataError (exit 3) naming file and line,
    InputError (exit 4), with nothing committed, where an id is `expected` and theirs is another.
    """
    output = staging.plan.output
    config = config_of(run, output)
    records: list[FileRecord] = []
    ids, skipped, longest, schema = set[str](), 0, 0, None
    chats = False
    for chunk in _chunks(normalised(config, run.imports), _ROWS_PER_SHARD):
        kept = []
        chats = chats or any(row["messages"] is not None for _, row in chunk)
        lengths = num_tokens([row for _, row in chunk])
        for (place, row), length in zip(chunk, lengths, strict=True):
            _add_id(place, row, ids)
            if _fits(place, length, room, config):
                kept.append(row)
                longest = max(longest, length)
        skipped += len(chunk) - len(kept)
        if kept:
            data = _table(kept, schema)
            schema = data.schema
            name = staging.file_name("part", len(records))
            try:
                records.append(staging.write_table(output, name, data))
            except pa.ArrowNotImplementedError as error:  # a column of empty objects, say
                raise DataError(f"prompts.source: {config.source}: {error}") from None
    if not records:
        raise DataError(f"prompts.source: {config.source}: holds no prompt that can be used")
    if not chats and (config.chat_template is not None or config.chat_template_arguments):
        key = "chat_template" if config.chat_template is not None else "chat_template_arguments"
        raise UsageError(f"prompts.{key}: no prompt is a chat; set prompts.chat: true, or leave it out")
    summary = {"skipped": skipped, "longest_prompt_tokens": longest, "source": config.source}
    if expected is not None and id_of(records) != expected:
        raise InputError(
            f"prompts: fixed for the run {run.name}, but {config.source} holds others than its rollouts were"
            " made from; put those back, or give a new `run:` name"
        )
    return staging.commit(Product({output: id_of(records)}, records, summary))


def _add_id(place: str, row: Row, ids: set[str]) -> None:
    """Add the user's own id of a row, where it has one, to those met before."""
    if "id" in row:
        if (name := json.dumps(row["id"], default=str)) in ids:
            raise DataError(f"{place}: id {row['id']!r} stands twice; ids must be unique")
        ids.add(name)


def _fits(place: str, length: int, room: int | None, config: PromptsConfig) -> bool:
    """Whether a prompt leaves room for a response; without on_long_prompt: skip it has to."""
    if room is None or length <= room:
        return True
    if config.on_long_prompt == "skip":
        return False
    raise DataError(
        f"{place}: prompt of {length} tokens, but the context leaves room for {room} beside"
        " max_new_tokens; shorten it, or set prompts.on_long_prompt: skip"
    )


def draw(num_prompts: int, seed: int, iteration: int, count: int) -> np.ndarray:
    """Rows of the prompts table that an iteration draws, int64 [count].

    Each pass over the data is a permutation of its own; iteration i takes positions i * count onwards.
    """
    positions = np.arange(iteration * count, (iteration + 1) * count)
    drawn = np.empty(count, dtype=np.int64)
    for number in np.unique(positions // num_prompts):
        order = np.random.default_rng([seed, int(number)]).permutation(num_prompts)
        here = positions // num_prompts == number
        drawn[here] = order[positions[here] % num_prompts]
    return drawn


def encode(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", chat: Chat
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


def _chunks(items: Iterator[tuple[str, Row]], size: int) -> Iterator[list[tuple[str, Row]]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


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
    column = names.messages if row.get(names.messages) is not None else names.prompt
    messages = row.get(names.messages)
    prompt = row.get(names.prompt) if messages is None else None
    if isinstance(prompt, list):  # a conversational data set as TRL has it
        messages, prompt = prompt, None
    if messages is None and names.prompt not in row:
        raise DataError(f"{place}: no column {names.prompt}; found {', '.join(row)} (prompts.columns.prompt)")
    if messages is None and (not isinstance(prompt, str) or not prompt.strip()):
        raise DataError(f"{place}: {names.prompt} is {prompt!r}; a prompt must be text that is not empty")
    if messages is not None:
        messages = [_message(place, message) for message in _as_list(place, column, messages)]
    elif config.chat or config.system is not None:
        messages, prompt = [{"role": "user", "content": prompt}], None
    if config.system is not None and messages is not None:
        if messages[0]["role"] == "system":
            raise DataError(f"{place}: begins with a system message of its own; leave prompts.system out")
        messages = [{"role": "system", "content": config.system}, *messages]
    taken = {names.prompt, names.messages, names.answer}
    others = {name: value for name, value in row.items() if name not in taken}
    if clash := [name for name in others if name.lower() in ("prompt", "messages", "answer")]:
        key = clash[0].lower()
        raise DataError(
            f"{place}: column {clash[0]} has the name of one of the pipeline's own columns, but"
            f" prompts.columns.{key} is {getattr(names, key)}; say {key}: {clash[0]} there, or rename yours"
        )
    answer = _answer(place, names.answer, row.get(names.answer))
    return {"prompt": prompt, "messages": messages, "answer": answer, **others}


def _as_list(place: str, name: str, messages: Any) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {name} must be a list of {{role, content}} that is not empty")
    return messages


def _message(place: str, message: Any) -> Row:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise DataError(f"{place}: a message must be {{role, content}} with role one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in content}
        found = f"a list of parts ({', '.join(sorted(kinds)) or 'none'})"
        raise DataError(
            f"{place}: a message's content must be one text, found {found}; images are not supported"
        )
    if not isinstance(content, str):
        raise DataError(f"{place}: a message's content must be text, found {type(content).__name__}")
    return {"role": message["role"], "content": content}


def _answer(place: str, name: str, answer: Any) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int) or (isinstance(answer, float) and math.isfinite(answer)):
        return str(answer)
    found = answer if isinstance(answer, float) else type(answer).__name__
    raise DataError(f"{place}: {name} must be text or a number, found {found}")


def _column(rows: list[Row], name: str) -> pa.Array:
    """A column of the user's own in the type that its values have."""
    try:
        return pa.array([row.get(name) for row in rows])
    except OverflowError:
        message = "integers of more than 64 bits; make them text"
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        message = f"values of several types: {error}"
    raise DataError(f"prompts.source: column {name} holds {message}")


def _depth(data_type: pa.DataType) -> int:
    fields = [data_type.field(index) for index in range(data_type.num_fields)]
    return 1 + max((_depth(field.type) for field in fields), default=-1)


def _table(rows: list[Row], schema: pa.Schema | None) -> pa.Table:
    """Rows as Arrow, the pipeline's columns first; later shards take the schema of the first."""
    fixed = tables.schema("prompts")
    try:
        names = dict.fromkeys(name for row in rows for name in row if name not in fixed.names)
        if alike := [name for name in names if [each.lower() for each in names].count(name.lower()) > 1]:
            raise DataError(
                f"prompts.source: columns {alike[0]} and {alike[1]} differ by case alone, which SQL does not"
                " tell apart; rename one"
            )
        own = pa.table({name: _column(rows, name) for name in names})
        found = pa.schema([*fixed, *(own.schema if names else ())])
        if deep := [field.name for field in found if _depth(field.type) > _MAX_DEPTH]:
            raise DataError(
                f"prompts.source: column {deep[0]} holds lists or objects nested more than {_MAX_DEPTH} deep"
            )
        # from_pylist leaves out what the schema does not have, and makes 1 of 1.5 where it says integer.
        for field in pa.unify_schemas([schema or found, found], promote_options="permissive"):
            if field not in list(schema or found):
                raise DataError(
                    f"prompts.source: column {field.name} is of type {field.type} only behind the first"
                    f" {_ROWS_PER_SHARD:,} rows; give every row the same columns, of the same types"
                )
        return pa.Table.from_pylist(rows, schema=schema or found)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"prompts.source: a column holds values of several types: {error}") from None
