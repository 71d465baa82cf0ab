"""prompts: the user's rows -> the `prompts` table, once per run; and which of them an iteration draws."""

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.artifacts.files import sha256_of
from grpo.config import ColumnsConfig, PromptsConfig
from grpo.errors import DataError, InputError
from grpo.generate.source import BUILT_IN, Row, read_rows

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


def plan(run: Run, output: str = OUTPUT) -> Plan:
    """What the prompts of this run depend on. Raises DataError (exit 3) when the source is missing."""
    config = config_of(run, output)
    path = run.imports / config.source
    if source_is_gone(run, output):
        raise DataError(f"prompts.source: {path}: no such file")
    sources = {} if config.source in BUILT_IN else {"prompts.source": sha256_of(path)}
    return Plan(output, STAGE_VERSION, output, None, {"prompts": described(config)}, {}, sources)


def described(config: PromptsConfig) -> dict[str, Any]:
    """All that counts of a section; of a file it is the content, not the name."""
    return config.model_dump(exclude=set() if config.source in BUILT_IN else {"source"})


def source_is_gone(run: Run, output: str = OUTPUT) -> bool:
    """Whether the file with the prompts is not there."""
    source = config_of(run, output).source
    return source not in BUILT_IN and not (run.imports / source).is_file()


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
    for chunk in _chunks(normalised(run, output), _ROWS_PER_SHARD):
        kept = []
        lengths = num_tokens([row for _, row in chunk])
        for (place, row), length in zip(chunk, lengths, strict=True):
            if "id" in row:
                if (name := json.dumps(row["id"], default=str)) in ids:
                    raise DataError(f"{place}: id {row['id']!r} stands twice; ids must be unique")
                ids.add(name)
            if room is None or length <= room:
                kept.append(row)
                longest = max(longest, length)
            elif config.on_long_prompt == "skip":
                skipped += 1
            else:
                raise DataError(
                    f"{place}: prompt of {length} tokens, but the context leaves room for {room} beside"
                    " max_new_tokens; shorten it, or set prompts.on_long_prompt: skip"
                )
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
    summary = {"skipped": skipped, "longest_prompt_tokens": longest}
    if expected is not None and id_of(records) != expected:
        raise InputError(
            f"prompts: fixed for the run {run.name}, but {config.source} holds others than its rollouts were"
            " made from; put those back, or give a new `run:` name"
        )
    return staging.commit({output: id_of(records)}, records, summary)


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


def render(row: Row, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text the model sees: messages through the tokenizer's own chat template, or the prompt as it is."""
    if row["messages"] is None:
        return str(row["prompt"])
    if tokenizer.chat_template is None:
        raise InputError("prompts: are chat messages, but the model's tokenizer has no chat template")
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    return str(text)


def encode(rows: list[Row], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[str], list[list[int]]]:
    """Text and token ids of each prompt. A chat template writes its own special tokens."""
    texts = [render(row, tokenizer) for row in rows]
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


def normalised(run: Run, output: str = OUTPUT) -> Iterator[tuple[str, Row]]:
    """(place, row) of the source with prompt_id, prompt, messages, answer, and every other column as it is.

    Raises DataError (exit 3) naming file and line.
    """
    config = config_of(run, output)
    for prompt_id, (place, row) in enumerate(read_rows(config.source, run.imports)):
        yield place, {"prompt_id": prompt_id, **_normalise(place, row, config)}


def _normalise(place: str, row: Row, config: PromptsConfig) -> Row:
    if reserved := [name for name in _RESERVED if name in row]:
        raise DataError(
            f"{place}: column {reserved[0]} is the pipeline's own; give yours another name, such as id"
        )
    names = config.columns
    messages = row.get(names.messages)
    prompt = row.get(names.prompt) if messages is None else None
    if messages is None and names.prompt not in row:
        raise DataError(f"{place}: no column {names.prompt}; found {', '.join(row)} (prompts.columns.prompt)")
    if messages is None and (not isinstance(prompt, str) or not prompt.strip()):
        raise DataError(f"{place}: {names.prompt} is {prompt!r}; a prompt must be text that is not empty")
    if messages is not None:
        messages = [_message(place, message) for message in _as_list(place, names, messages)]
    elif config.chat or config.system is not None:
        messages, prompt = [{"role": "user", "content": prompt}], None
    if config.system is not None and messages is not None:
        messages = [{"role": "system", "content": config.system}, *messages]
    taken = {names.prompt, names.messages, names.answer}
    others = {name: value for name, value in row.items() if name not in taken}
    if clash := [name for name in ("prompt", "messages", "answer") if name in others]:
        raise DataError(
            f"{place}: column {clash[0]} has the name of one of the pipeline's own columns, but"
            f" prompts.columns.{clash[0]} names another; rename yours"
        )
    answer = _answer(place, names.answer, row.get(names.answer))
    return {"prompt": prompt, "messages": messages, "answer": answer, **others}


def _as_list(place: str, names: ColumnsConfig, messages: Any) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {names.messages} must be a list of {{role, content}} that is not empty")
    return messages


def _message(place: str, message: Any) -> Row:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise DataError(f"{place}: a message must be {{role, content}} with role one of {', '.join(_ROLES)}")
    if not isinstance(message.get("content"), str):
        raise DataError(f"{place}: a message's content must be text; images are not supported")
    return {"role": message["role"], "content": message["content"]}


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
