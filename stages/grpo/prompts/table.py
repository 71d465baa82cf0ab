"""table: the user's rows -> the `prompts` table, once per run; and which of them an iteration draws."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grpo.artifacts import (
    ActiveRun,
    FileRecord,
    Manifest,
    Plan,
    Product,
    Staging,
    id_of,
    is_hub_id,
    keep_source,
)
from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.config.prompts import BUILT_IN
from grpo.errors import DataError, InputError, UsageError
from grpo.prompts.arrow import arrow_table
from grpo.prompts.chat import chat_of
from grpo.prompts.rows import normalised
from grpo.prompts.source import Row, source_digest

OUTPUT = "prompts"
HELD_OUT = "eval_prompts"
STAGE_VERSION = 2  # 2: the summary holds the longest prompt
NumTokens = Callable[[list[Row]], Iterable[int]]  # of each row's prompt, as the model sees it
Render = Callable[[list[Row]], list[Row]]  # the rows, each with its text as the model sees it
_ROWS_PER_SHARD = 100_000
_CHARACTERS_PER_SHARD = 2**29


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
    was_read = kept is not None and kept.summary.get("source") == config.source
    if kept is not None and ((was_read and source_is_gone(run, output)) or is_on_hub(config, run.imports)):
        found = kept.user_files.get("prompts.source")
    else:
        found = source_digest(config, run.imports)
    sources = {"prompts.source": found} if found else {}
    if config.chat_template is not None:
        chat_of(config, run.imports)  # says so where the file cannot be read
        sources["prompts.chat_template"] = sha256_of(run.imports / config.chat_template)
    return Plan(output, STAGE_VERSION, output, None, {"prompts": described(run, output)}, {}, sources)


def described(run: ActiveRun, output: str = OUTPUT) -> dict[str, Any]:
    """All that counts of a section; of a file or folder it is the content, not the name."""
    config = config_of(run, output)
    by_name = is_on_hub(config, run.imports) and not source_is_gone(run, output)
    return config.recorded(set() if by_name or config.source in BUILT_IN else {"source"})


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
    if manifest is None or manifest.summary.get("source") != config.source:
        return False
    return "source" not in manifest.config["prompts"]


def prepare(
    run: ActiveRun,
    staging: Staging,
    num_tokens: NumTokens,
    room: int | None,
    expected: str | None = None,
    render: Render = list,
    notes: list[str] | None = None,
    policy: str = "",
) -> Manifest:
    """Write and commit `prompts`, or `eval_prompts`: the output of the plan that is staged.

    room: the most tokens of a prompt that leave space for a response. render: gives chats their text. notes:
    as in normalised(). policy: id of the one whose tokens are counted. Raises DataError (exit 3) with file
    and line, InputError (4) for an id not `expected`.
    """
    output, config = staging.plan.output, config_of(run, staging.plan.output)
    _keep_template(run, staging, config)
    records, ids = list[FileRecord](), set[str]()
    skipped, longest, schema, chats = 0, 0, None, False
    rows = normalised(config, run.imports, notes)
    while chunk := _shard(rows):
        chats = chats or any(row["messages"] is not None for _, row in chunk)
        seen = render([row for _, row in chunk])
        places = [place for place, _ in chunk]
        kept = usable(list(zip(places, seen, strict=True)), num_tokens, room, config, ids)
        skipped += len(chunk) - len(kept)
        if kept:
            longest = max(longest, *(length for *_, length in kept))
            schema = _write(kept, staging, config, records, schema)
    if not records:
        raise DataError(f"prompts.source: {config.source}: holds no prompt that can be used")
    if not chats:
        check_no_template(config)
    if expected is not None and id_of(records) != expected:
        raise InputError(_fixed(run, config))
    summary = {"skipped": skipped, "longest_prompt_tokens": longest, "source": config.source}
    summary |= {"policy": policy} if policy else {}
    return staging.commit(Product({output: id_of(records)}, records, summary))


def _shard(rows: Iterator[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """The next rows, as many as one file and the memory hold."""
    chunk, size = list[tuple[str, Row]](), 0
    for place, row in islice(rows, _ROWS_PER_SHARD):
        chunk.append((place, row))
        size += len(row["prompt"] or "") + sum(
            len(each.get("content") or "") for each in row["messages"] or ()
        )
        if size > _CHARACTERS_PER_SHARD:
            break
    return chunk


def _fixed(run: ActiveRun, config: PromptsConfig) -> str:
    others = f"{config.source} holds others than its rollouts were made from"
    return f"prompts: fixed for the run {run.name}, but {others}; put those back, or give a new `run:` name"


def _keep_template(run: ActiveRun, staging: Staging, config: PromptsConfig) -> None:
    """Keep the text of the user's chat template in the run."""
    if config.chat_template is not None:
        path = run.imports / config.chat_template
        keep_source(run, staging.plan.user_files["prompts.chat_template"], path.name, path.read_bytes)


def check_no_template(config: PromptsConfig) -> None:
    """Refuse what is for chats alone, where no prompt is one."""
    if config.chat_template is not None or config.chat_template_arguments:
        key = "chat_template" if config.chat_template is not None else "chat_template_arguments"
        raise UsageError(f"prompts.{key}: no prompt is a chat; set prompts.chat: true, or leave it out")


def _write(
    kept: list[tuple[str, Row, int]],
    staging: Staging,
    config: PromptsConfig,
    records: list[FileRecord],
    schema: pa.Schema | None,
) -> pa.Schema:
    """Write one shard, add its record, and return the schema that all have."""
    places, rows = [place for place, *_ in kept], [row for _, row, _ in kept]
    try:
        data = arrow_table(rows, places, schema, _ROWS_PER_SHARD)
        name = staging.file_name("part", len(records))
        records.append(staging.write_table(staging.plan.output, name, data))
    except (ValueError, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"prompts.source: {config.source}: {error}") from None
    written: pa.Schema = data.schema
    return written


def usable(
    chunk: list[tuple[str, Row]],
    num_tokens: NumTokens,
    room: int | None,
    config: PromptsConfig,
    ids: set[str],
) -> list[tuple[str, Row, int]]:
    """(place, row, tokens) of each prompt that leaves room for a response; adds the user's ids to `ids`."""
    kept = []
    for (place, row), length in zip(chunk, num_tokens([row for _, row in chunk]), strict=True):
        if "id" in row:
            if (name := json.dumps(row["id"], default=str)) in ids:
                raise DataError(f"{place}: id {row['id']!r} occurs twice; ids must be unique")
            ids.add(name)
        if not length:
            raise DataError(f"{place}: its prompt is no tokens; give the model some text")
        if room is None or length <= room:
            kept.append((place, row, length))
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
    passes, places = np.divmod(np.arange(iteration * count, (iteration + 1) * count), num_prompts)
    orders = {n: np.random.default_rng([seed, n]).permutation(num_prompts) for n in set(passes.tolist())}
    return np.array([orders[n][place] for n, place in zip(passes.tolist(), places, strict=True)])
