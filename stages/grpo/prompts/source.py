"""source: the user's data set -> rows. JSON lines, Parquet, CSV, the built-in task, or one of `datasets`.

A mistake in the data is an error that names file and line; nothing is repaired and nothing is left out.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.config.prompts import BUILT_IN
from grpo.errors import DataError
from grpo.prompts.arithmetic import held_out_rows, training_rows
from grpo.prompts.dataset import dataset_rows, folder_digest

_CSV_FIELD_CHARACTERS = 2**31 - 1
Row = dict[str, Any]
_BUILT_IN_ROWS = dict(zip(BUILT_IN, (training_rows, held_out_rows), strict=True))


def read_rows(config: PromptsConfig, folder: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of the source, a path from `folder`; place is `file:line` for messages.

    Raises DataError (exit 3) for a missing file, a bad line, or an unknown format.
    """
    if config.source in BUILT_IN:
        rows = _BUILT_IN_ROWS[config.source]()
        yield from ((f"{config.source}:{n}", dict(row)) for n, row in enumerate(rows, start=1))
        return
    path = folder / config.source
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        if path.is_file():
            known = ", ".join(readers)
            raise DataError(f"prompts.source: {config.source}: expected a file ending in {known}")
        yield from dataset_rows(config, folder)
        return
    if not path.is_file():
        raise DataError(f"prompts.source: {path}: no such file")
    yield from readers[path.suffix](path)


def source_digest(config: PromptsConfig, folder: Path) -> str | None:
    """Digest of the content of a source on this disk, wherever it is; None: it is not on this disk.

    Raises DataError (exit 3) where a file is missing.
    """
    path = folder / config.source
    if config.source in BUILT_IN or not (config.is_file or path.exists()):
        return None
    if path.is_dir():
        return folder_digest(path, config.split)
    if not path.is_file():
        raise DataError(f"prompts.source: {path}: no such file")
    return sha256_of(path)


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
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            # A line's end would move the place of an error into the next.
            row = json.loads(line.rstrip(), object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise DataError(f"{place}: nested too deeply") from None
        except ValueError as error:  # a duplicate key, or a number of too many digits with advice behind it
            raise DataError(f"{place}: {str(error).partition(';')[0]}") from None
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{place}: holds a lone surrogate (\\ud800-\\udfff), which is not text") from None
        except ValueError:
            raise DataError(f"{place}: holds NaN or Infinity, which is no JSON") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{place}: expected an object such as {{"prompt": ...}}, found {type(row).__name__}'
            )
        yield place, row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice} stands twice")
    return found


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(
        _CSV_FIELD_CHARACTERS
    )  # of the whole process, 128 KiB at first: a document is longer
    # strict: a quote that is never closed would swallow the rows behind it.
    reader = csv.DictReader((line for _, line in _text(path)), strict=True)
    try:
        names = reader.fieldnames or ()
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}:1: two columns are named {twice[0]}; every column needs its own name")
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{place}: not the {len(names)} fields that the header names")
            yield place, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}: two columns are named {twice[0]}; every column needs its own name")
        _refuse_images(path, file.schema_arrow)
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8, say
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _refuse_images(path: Path, schema: Any) -> None:
    """`datasets` writes an image, or a sound, as a struct of bytes and path."""
    for field in schema:
        kind = getattr(field.type, "value_type", field.type)  # of a list
        if {"bytes", "path"} == {kind.field(number).name for number in range(kind.num_fields)}:
            raise DataError(
                f"{path}: column {field.name} holds images or other media (a struct of bytes and path), and"
                " prompts are text only; remove the column"
            )
