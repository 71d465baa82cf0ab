"""table: the user's rows -> the `prompts` table, once per run; and which of them an iteration draws."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Plan, Product, Staging, id_of, is_hub_id
from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.config.prompts import BUILT_IN
from grpo.errors import DataError, InputError, UsageError
from grpo.prompts.chat import chat_of, template_path
from grpo.prompts.rows import normalised
from grpo.prompts.source import Row, source_digest

OUTPUT = "prompts"
HELD_OUT = "eval_prompts"
STAGE_VERSION = 2  # 2: the summary holds the longest prompt
_ROWS_PER_SHARD = 100_000
_MAX_DEPTH = 32  # of a column; a Parquet schema of more than 100 levels, two for each list, cannot be read


def config_of(run: ActiveRun, output: str = OUTPUT) -> PromptsConfig:
    """The section that describes `prompts` or, with `evaluate` configured, `eval_prompts`."""
    if output == OUTPUT:
        return run.config.prompts
    assert run.config.evaluate is not None, "there are no held-out prompts without `evaluate`"
    return run.config.evaluate.prompts


def plan(run: ActiveRun, output: str = OUTPUT, kept: Manifest | None = None) -> Plan:
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


def described(run: ActiveRun, output: str = OUTPUT) -> dict[str, Any]:
    """All that counts of a section; of a file or folder it is the content, not the name."""
    config = config_of(run, output)
    by_content = config.source not in BUILT_IN and (
        source_is_gone(run, output) or not is_on_hub(config, run.imports)
    )
    return config.model_dump(exclude={"source"} if by_content else set())


def is_on_hub(config: PromptsConfig, folder: Path) -> bool:
    """Whether the source is a data set on the hub."""
    return config.source not in BUILT_IN and not config.is_file and is_hub_id(config.source, folder)


def source_is_gone(run: ActiveRun, output: str = OUTPUT) -> bool:
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
    run: ActiveRun,
    staging: Staging,
    num_tokens: Callable[[list[Row]], list[int]],
    room: int | None,
    expected: str | None = None,
) -> Manifest:
    """Write and commit `prompts`, or `eval_prompts`: the output of the plan that is staged.

    num_tokens: of each row's prompt as the model sees it; room: the most that leave space for max_new_tokens,
    None: no limit. Raises DataError (3) naming file and line, InputError (4) where another id is `expected`.
    """
    output = staging.plan.output
    config = config_of(run, output)
    records: list[FileRecord] = []
    ids, skipped, longest, schema, chats = set[str](), 0, 0, None, False
    for chunk in _chunks(normalised(config, run.imports)):
        chats = chats or any(row["messages"] is not None for _, row in chunk)
        kept = _usable(chunk, num_tokens, room, config, ids)
        skipped += len(chunk) - len(kept)
        if kept:
            longest = max(longest, *(length for _, length in kept))
            data = _table([row for row, _ in kept], schema)
            schema = data.schema
            try:
                records.append(staging.write_table(output, staging.file_name("part", len(records)), data))
            except pa.ArrowNotImplementedError as error:  # a column of empty objects, say
                raise DataError(f"prompts.source: {config.source}: {error}") from None
    if not records:
        raise DataError(f"prompts.source: {config.source}: holds no prompt that can be used")
    if not chats and (config.chat_template is not None or config.chat_template_arguments):
        key = "chat_template" if config.chat_template is not None else "chat_template_arguments"
        raise UsageError(f"prompts.{key}: no prompt is a chat; set prompts.chat: true, or leave it out")
    if expected is not None and id_of(records) != expected:
        raise InputError(
            f"prompts: fixed for the run {run.name}, but {config.source} holds others than its rollouts were"
            " made from; put those back, or give a new `run:` name"
        )
    summary = {"skipped": skipped, "longest_prompt_tokens": longest, "source": config.source}
    return staging.commit(Product({output: id_of(records)}, records, summary))


def _chunks(rows: Iterator[tuple[str, Row]]) -> Iterator[list[tuple[str, Row]]]:
    while chunk := list(islice(rows, _ROWS_PER_SHARD)):
        yield chunk


def _usable(
    chunk: list[tuple[str, Row]],
    num_tokens: Callable[[list[Row]], list[int]],
    room: int | None,
    config: PromptsConfig,
    ids: set[str],
) -> list[tuple[Row, int]]:
    """(row, tokens) of each prompt that leaves room for a response; adds the user's own ids to `ids`."""
    kept = []
    for (place, row), length in zip(chunk, num_tokens([row for _, row in chunk]), strict=True):
        if "id" in row:
            if (name := json.dumps(row["id"], default=str)) in ids:
                raise DataError(f"{place}: id {row['id']!r} occurs twice; ids must be unique")
            ids.add(name)
        if room is None or length <= room:
            kept.append((row, length))
        elif config.on_long_prompt != "skip":
            raise DataError(
                f"{place}: prompt of {length} tokens, but the context leaves room for {room} beside"
                " max_new_tokens; shorten it, or set prompts.on_long_prompt: skip"
            )
    return kept


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


def _column(rows: list[Row], name: str) -> pa.Array:
    """A column of the user's own in the type that its values have."""
    try:
        return pa.array([row.get(name) for row in rows])
    except OverflowError:
        raise DataError(
            f"prompts.source: column {name} holds integers outside -2^63 to 2^63 - 1; make them text"
        ) from None
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        problem = f"column {name} holds values of several types: {error}"
        raise DataError(f"prompts.source: {problem}") from None


def _depth(data_type: pa.DataType) -> int:
    fields = [data_type.field(index) for index in range(data_type.num_fields)]
    return max((1 + _depth(field.type) for field in fields), default=0)


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
        found = pa.schema([*fixed, *((name, _column(rows, name).type) for name in names)])
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
