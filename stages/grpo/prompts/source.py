"""source: the user's data set -> rows. JSON lines, Parquet, CSV, the built-in task, or one of `datasets`.

A mistake in the data is an error that names file and line; nothing is repaired and nothing is left out.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.config.prompts import BUILT_IN
from grpo.errors import DataError, first_line
from grpo.prompts.arithmetic import held_out_rows, training_rows
from grpo.prompts.dataset import arrow_rows, dataset_rows, folder_digest

Row = dict[str, Any]


def read_rows(config: PromptsConfig, folder: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row; place: `file:line`, for messages, with which a DataError (exit 3) begins."""
    path = folder / config.source
    if config.source in BUILT_IN:
        rows = training_rows() if config.source == BUILT_IN[0] else held_out_rows()
        yield from ((f"{config.source}:{n}", row) for n, row in enumerate(rows, start=1))
    elif config.is_file:
        yield from _READERS[path.suffix](_existing(path))
    elif path.is_file():
        raise DataError(f"prompts.source: {config.source}: expected a file ending in {', '.join(_READERS)}")
    else:
        yield from dataset_rows(config, folder)


def source_digest(config: PromptsConfig, folder: Path) -> str | None:
    """Digest of what the source holds; None: it is not on this disk. Raises DataError for a missing file."""
    path = folder / config.source
    if config.source in BUILT_IN or not (config.is_file or path.exists()):
        return None
    if path.is_dir():
        return folder_digest(path, config.split)
    return sha256_of(_existing(path))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"prompts.source: {path}: no such file")
    return path


def _text(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file; a byte order mark and CRLF line ends just work."""
    with path.open("rb") as file:  # a text file is decoded in blocks, and an error could not name its line
        for number, content in enumerate(file, start=1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None
            yield number, line


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _text(path):
        if not line.strip():
            continue
        try:
            row = _JSON.decode(line.rstrip())  # a line's end would move the place of an error into the next
            json.dumps(row, ensure_ascii=False).encode()
            if not isinstance(row, dict):
                raise ValueError(f'expected an object such as {{"prompt": ...}}, found {type(row).__name__}')
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg} at column {error.colno}"
        except RecursionError:
            problem = "nested too deeply"
        except UnicodeEncodeError:
            problem = "holds a lone surrogate (\\ud800-\\udfff), which is not text"
        except ValueError as error:  # one of ours, or a number of too many digits with advice behind it
            problem = str(error).partition(";")[0]
        else:
            yield f"{path}:{number}", row
            continue
        raise DataError(f"{path}:{number}: {problem}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)} occurs twice")
    return found


def _finite(number: str) -> float:
    if math.isfinite(value := float(number)):
        return value
    raise ValueError("holds NaN or Infinity, which is no JSON")


# Refuses what Python takes and JSON does not.
_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)  # of the whole process, 128 KiB at first: a document is longer
    # strict: a quote that is never closed would swallow the rows behind it.
    reader = csv.DictReader((line for _, line in _text(path)), strict=True)
    try:
        names = reader.fieldnames or ()
        _check_names(f"{path}:1", names)
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{place}: not the {len(names)} fields that the header names")
            yield place, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        file = pq.ParquetFile(path)
        _check_names(str(path), file.schema_arrow.names)
        yield from arrow_rows(str(path), str(path), file.schema_arrow, file.iter_batches())
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8, say
        raise DataError(f"{path}: cannot be read as Parquet: {first_line(error)}") from None


def _check_names(place: str, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{place}: two columns are named {twice[0]}; every column needs its own name")


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
