"""artifacts.sampled: what must hold of rollouts, asked again where they are read.

The stage that sampled them has checked it; since then a hand may have edited and sealed them, and what a
learner or a reward makes of a token that does not exist, or of a row that is gone, nobody sees.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpo.artifacts.manifest import Manifest
from grpo.artifacts.partial import num_rounds
from grpo.artifacts.run import Run
from grpo.errors import CorruptError
from grpo.tables import KEY, key_text

_LISTS = ("response_token_ids", "old_logprobs", "response_mask")  # one value per token of the response
CHECKED = [*KEY, "prompt_token_ids", *_LISTS, "response_tokens", "temperature"]
"""Columns of `rollouts` that are looked at, where they are given."""


def read_rollouts(
    run: Run, iteration: int, columns: list[str] = CHECKED, vocabulary_size: int | None = None
) -> pa.Table:
    """Columns of the rollouts of an iteration, in key order, checked; vocabulary_size None: not known.

    Raises CorruptError (exit 6) with the key of the first that no engine can have sampled, as it stands.
    """
    data = run.read("rollouts", iteration, columns)
    if are_own(run, "rollouts", iteration):
        return data
    manifest = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    place = run.folder("rollouts", iteration)
    if (expected := _expected(manifest)) is not None:
        check_keys(place, data, expected)
    for rows, problem in _problems(data, vocabulary_size):
        if rows.any():
            raise CorruptError(f"{place}: rollout {_key(data, int(rows.argmax()))}: {problem}")
    return data


def are_own(run: Run, output: str, iteration: int) -> bool:
    """Whether this process has committed an output, and so checked what it holds."""
    manifest = run.manifest(output, iteration)
    return manifest is not None and manifest.fingerprint in run.made


def check_keys(place: object, data: pa.Table, expected: pa.Table) -> None:
    """Raise CorruptError (exit 6) unless `data` has the keys expected, each once, in whatever order."""
    found, order = data.select(list(KEY)).cast(expected.schema), [(name, "ascending") for name in KEY]
    if found.equals(expected):
        return
    found, expected = found.sort_by(order), expected.sort_by(order)
    if found.equals(expected):
        return
    common = min(len(found), len(expected))
    same = np.ones(common, dtype=bool)
    for name in KEY:
        same &= found[name].to_numpy()[:common] == expected[name].to_numpy()[:common]
    row = common if same.all() else int(same.argmin())
    there = f"found {_key(found, row)}" if row < len(found) else f"it ends after {row} rows"
    wanted = f"expected rollout {_key(expected, row)}" if row < len(expected) else "no more rows are expected"
    raise CorruptError(f"{place}: {wanted}, {there}: rows are missing, there twice, or of others")


def _key(data: pa.Table, row: int) -> str:
    return key_text(data.select(list(KEY)).slice(row, 1).to_pylist()[0])


def _expected(manifest: Manifest) -> pa.Table | None:
    """The keys that were planned: whole groups, each of as many samples; None where no plan says so."""
    generate = manifest.config.get("generate", {})
    samples, groups = generate.get("samples_per_prompt"), generate.get("prompts_per_iteration")
    if not samples or not groups:
        return None
    number = np.arange(samples * groups * num_rounds(manifest), dtype=np.int32)
    columns = [np.full(len(number), manifest.iteration, dtype=np.int32), number // samples, number % samples]
    return pa.table(dict(zip(KEY, columns, strict=True)))


def _problems(data: pa.Table, vocabulary_size: int | None) -> Iterator[tuple[np.ndarray, str]]:
    """(true for each row of which it holds, what is wrong with it)."""
    lengths = {name: _lengths(data[name]) for name in data.column_names if pa.types.is_list(data[name].type)}
    for name, length in lengths.items():
        yield length < 0, f"{name} is null"
    for name in ("prompt_token_ids", "response_token_ids"):
        if name in lengths:
            limit = 2**31 if vocabulary_size is None else vocabulary_size
            what = f"{name} holds an id outside the vocabulary of {limit}"
            yield _rows_where(data[name], lengths[name], partial(_outside, limit)), what
    if "response_token_ids" in lengths:
        tokens = lengths["response_token_ids"]
        for name in _LISTS[1:]:
            if name in lengths:
                yield lengths[name] != tokens, f"{name} has not one value per token of the response"
        if "response_tokens" in data.column_names:
            yield (
                data["response_tokens"].to_numpy() != tokens,
                "response_tokens is not the number of its tokens",
            )
    if "old_logprobs" in lengths:
        wrong = _rows_where(
            data["old_logprobs"], lengths["old_logprobs"], lambda x: ~((x > -np.inf) & (x <= 0))
        )
        yield wrong, "old_logprobs holds one that is not finite or above 0"
    if "temperature" in data.column_names:
        heat = data["temperature"].to_numpy()
        yield ~((heat > 0) & (heat < np.inf)), "temperature is not finite and above 0"


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Values of each row of a list column; -1 for null."""
    found: np.ndarray = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    return found


def _outside(limit: int, ids: np.ndarray) -> np.ndarray:
    found: np.ndarray = (ids < 0) | (ids >= limit)
    return found


def _rows_where(
    column: pa.ChunkedArray, lengths: np.ndarray, wrong: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """True for each row with a value that is null, or `wrong`."""
    flat = pc.list_flatten(column)
    bad = wrong(flat.to_numpy()) if flat.null_count == 0 else flat.is_null().to_numpy()
    rows = np.zeros(len(lengths), dtype=bool)
    if bad.any():
        rows[np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))[bad]] = True
    return rows
