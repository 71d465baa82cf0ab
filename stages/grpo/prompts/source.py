"""source: the user's data set -> rows. JSON lines, Parquet, CSV, the built-in task, or one of `datasets`.

A mistake in the data is an error that names file and line; nothing is repaired and nothing is left out.
"""

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo.artifacts import digest, is_hub_id
from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.config.named_files import not_a_file
from grpo.config.prompts import BUILT_IN
from grpo.errors import DataError, UsageError, first_line, listed
from grpo.prompts.arithmetic import held_out_rows, training_rows
from grpo.prompts.memory import within_memory

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # of save_to_disk: of one table, and of several
_ROWS_PER_BATCH = 1000
_MOST_BYTES = 2**28  # of a line
_ROWS_PER_PIECE = 100  # as Python objects at once
_WHOLE = re.compile(r"-?[0-9]+\.0")  # how pandas writes the whole numbers of a column with a gap


def read_rows(config: PromptsConfig, folder: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row; place: `file:line`, for messages, with which a DataError (exit 3) begins."""
    path = folder / config.source
    if config.source in BUILT_IN:
        rows = training_rows() if config.source == BUILT_IN[0] else held_out_rows()
        yield from ((f"{config.source}:{n}", row) for n, row in enumerate(rows, start=1))
    elif config.is_file:
        yield from _READERS[path.suffix](_existing(path), config.columns.answer)
    elif path.is_file():
        raise DataError(f"prompts.source: {config.source}: expected a file ending in {', '.join(_READERS)}")
    else:
        yield from _dataset_rows(config, folder)


def source_digest(config: PromptsConfig, folder: Path) -> str | None:
    """Digest of what the source holds; None: it is not on this disk. Raises DataError for a missing file."""
    path = folder / config.source
    if config.source in BUILT_IN or not (config.is_file or path.exists()):
        return None
    if path.is_dir():
        return _folder_digest(path, config.split)
    return sha256_of(_existing(path))


def _existing(path: Path) -> Path:
    if problem := not_a_file(path):
        raise DataError(f"prompts.source: {path}: {problem}")
    return path


def _text(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file; a byte order mark and CRLF line ends just work."""
    with path.open("rb") as file:  # a text file is decoded in blocks, and an error could not name its line
        lines = iter(lambda: file.readline(_MOST_BYTES), b"")
        for number, content in enumerate(lines, start=1):
            if len(content) == _MOST_BYTES:
                raise DataError(f"{path}:{number}: more than {_MOST_BYTES >> 20} MiB in a line")
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None
            yield number, line


def _jsonl(path: Path, answer: str) -> Iterator[tuple[str, Row]]:
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


def _csv(path: Path, answer: str) -> Iterator[tuple[str, Row]]:
    """An empty field is missing, and answers that are all like 3.0 are whole: CSV knows no types."""
    answers = (row.get(answer) for _, row in _csv_rows(path))
    whole = _are_whole(answers)
    for place, row in _csv_rows(path):
        if whole and row.get(answer) is not None:
            row[answer] = row[answer].removesuffix(".0")
        yield place, row


def _are_whole(answers: Iterable[str | None]) -> bool:
    """Whether there are any, and all are whole numbers with a point; the first that is not ends the look."""
    found = False
    try:
        for answer in filter(None, answers):
            found = True
            if not _WHOLE.fullmatch(answer):
                return False
    except DataError:  # the rows before it come first
        return False
    return found


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
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
            yield place, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from None


def _parquet(path: Path, answer: str) -> Iterator[tuple[str, Row]]:
    try:
        file = pq.ParquetFile(path)
        _check_names(str(path), file.schema_arrow.names)
        held = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if held != file.metadata.num_rows:
            raise DataError(f"{path}: says that it has {file.metadata.num_rows} rows, and holds {held}")
        batches = within_memory(str(path), file.iter_batches(_ROWS_PER_BATCH))
        yield from _arrow_rows(str(path), str(path), file.schema_arrow, batches, answer)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8, say
        raise DataError(f"{path}: cannot be read as Parquet: {first_line(error)}") from None


def _check_names(place: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{place}: two columns are named {twice[0]}; every column needs its own name")


def _dataset_rows(config: PromptsConfig, folder: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of the configured split. Raises DataError (exit 3), UsageError (2) without `datasets`."""
    where, place = f"prompts.source: {config.source}", f"{config.source} ({config.split})"
    data = _open(where, config, folder)
    schema = data.features.arrow_schema
    if encoded := [field.name for field in schema if "extension<arrow.json>" in str(field.type)]:
        # It is decoded only when it is used.
        raise DataError(f"{where}: column {encoded[0]} is of the type Json; save it as text or as a struct")
    batches = data.with_format("arrow").iter(_ROWS_PER_BATCH)
    yield from _arrow_rows(where, place, schema, batches, config.columns.answer)


def _arrow_rows(
    where: str, place: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table], answer: str
) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row. Raises DataError (exit 3), beginning with `where`, for media in a column."""
    for field in schema:
        if _holds_media(field.type):
            raise DataError(
                f"{where}: column {field.name} holds images or other media (a struct of bytes and path), and"
                " prompts are text only; leave the column out (in `datasets`: remove_columns)"
            )
    pieces = (
        batch.slice(at, _ROWS_PER_PIECE) for batch in batches for at in range(0, len(batch), _ROWS_PER_PIECE)
    )
    rows = chain.from_iterable(within_memory(where, (piece.to_pylist() for piece in pieces)))
    kind = schema.field(answer).type if answer in schema.names else None
    short = kind.to_pandas_dtype() if kind in (pa.float16(), pa.float32()) else None
    for number, row in enumerate(rows, start=1):
        if short is not None and row[answer] is not None:
            row[answer] = float(str(short(row[answer])))  # 0.1, and not the 0.10000000149 that is stored
        yield f"{place}: row {number}", row


def _holds_media(kind: pa.DataType) -> bool:
    """Whether images, sound or the like are in it, at any depth: `datasets` has them all in one form."""
    inner = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    is_media = inner.keys() == {"bytes", "path"} and pa.types.is_binary(inner["bytes"])
    return is_media or any(map(_holds_media, inner.values()))


def _folder_digest(path: Path, split: str) -> str:
    """Digest of the content of a folder that holds a data set; the same whenever it was written.

    Of what save_to_disk writes only the tables of the split count: what is beside them has a fingerprint that
    is drawn anew. Of any other folder every file counts but hidden ones, as README.md may say what is read.
    """
    root = path / split if (path / _SAVED_SPLITS).is_file() else path
    found = root.glob("*.arrow") if _is_saved(path) else path.rglob("*")
    names = sorted(file.relative_to(root) for file in found if file.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return digest([[name.as_posix(), sha256_of(root / name)] for name in visible])


def _is_saved(path: Path) -> bool:
    return (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file()


def _open(where: str, config: PromptsConfig, folder: Path) -> "Dataset":
    path, name = folder / config.source, config.source
    on_hub = is_hub_id(name, folder)
    if not on_hub and not path.is_dir():
        raise DataError(
            f"prompts.source: {path}: no such file or folder; expected `arithmetic`, a file ending in .jsonl,"
            " .csv or .parquet, a folder with a data set, or owner/name of one on the hub"
        )
    if not on_hub and config.revision is not None:
        raise UsageError(f"prompts.revision: {name} is a folder; only a data set on the hub has revisions")
    if on_hub and Path(name).exists():  # which `datasets` would take
        raise DataError(f"{where}: is here, but not beside the configuration; give its path from {folder}")
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{where}: needs the library `datasets`; pip install 'grpo-stages[data]'") from None
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if not on_hub and _is_saved(path):
            return _split_of(config, datasets.load_from_disk(str(path)))
        found = name if on_hub else str(path.absolute())
        given = {"revision": config.revision} if on_hub else {}
        return datasets.load_dataset(found, config.subset, split=config.split, **given)
    except ImportError as error:  # of a library that reads what is in it, images say
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from None
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        subset = f" (subset {config.subset})" if config.subset else ""
        raise DataError(f"{where}{subset}: cannot be loaded: {reason}") from None


def _split_of(config: PromptsConfig, saved: Any) -> "Dataset":
    """The configured split of what save_to_disk saved: several tables by name, or one without a name."""
    if config.subset is not None:
        raise ValueError("a saved data set has no subsets; leave prompts.subset out")
    tables = saved if isinstance(saved, dict) else {"train": saved, str(saved.split or "train"): saved}
    if config.split not in tables and not isinstance(saved, dict):
        raise ValueError(f"holds one table, not a split {config.split}; leave prompts.split out")
    if config.split not in tables:
        raise ValueError(
            f"has no split {config.split}; there are {listed(tables, config.split)} (prompts.split)"
        )
    return tables[config.split]


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
