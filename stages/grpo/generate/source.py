"""source: the user's data set -> rows. JSON lines, Parquet, CSV, or the built-in task.

A mistake in the data is an error that names file and line; nothing is repaired and nothing is left out.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.errors import DataError
from grpo.generate.arithmetic import training_rows

BUILT_IN = "arithmetic"
Row = dict[str, Any]


def read_rows(source: str, folder: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of `source`; place is `file:line`, for messages.

    Raises DataError (exit 3) for a missing file, a bad line, or an unknown format.
    """
    if source == BUILT_IN:
        yield from ((f"{BUILT_IN}:{n}", dict(row)) for n, row in enumerate(training_rows(), start=1))
        return
    path = folder / source
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        known = ", ".join(readers)
        raise DataError(f"prompts.source: {source}: expected `{BUILT_IN}` or a file ending in {known}")
    if not path.is_file():
        raise DataError(f"prompts.source: {path}: no such file")
    yield from readers[path.suffix](path)


def _text(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file; a byte order mark and CRLF line ends just work."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8; save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _text(path):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except UnicodeEncodeError:
            raise DataError(f"{place}: holds a lone surrogate (\\ud800-\\udfff), which is no text") from None
        except ValueError:
            raise DataError(f"{place}: holds NaN or Infinity, which is no JSON") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{place}: expected an object such as {{"prompt": ...}}, found {type(row).__name__}'
            )
        yield place, row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(line for _, line in _text(path))
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                names = len(reader.fieldnames or ())
                raise DataError(f"{place}: not the {names} fields that the header names")
            yield place, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
