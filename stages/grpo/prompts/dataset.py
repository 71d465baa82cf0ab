"""dataset: a data set of the library `datasets` -> rows: saved, in a folder it can load, or on the hub."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo.artifacts import digest, is_hub_id
from grpo.artifacts.files import sha256_of
from grpo.config import PromptsConfig
from grpo.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # of save_to_disk: of one table, and of several
_ROWS_PER_BATCH = 1000


def dataset_rows(config: PromptsConfig, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of the configured split. Raises DataError (exit 3), UsageError (2) without `datasets`."""
    where, place = f"prompts.source: {config.source}", f"{config.source} ({config.split})"
    data = _open(where, config, folder)
    schema = data.features.arrow_schema
    if encoded := [field.name for field in schema if "extension<arrow.json>" in str(field.type)]:
        raise DataError(
            f"{where}: column {encoded[0]} is of the type Json, which is decoded only when it is used; save"
            " it as text or as a struct"
        )
    yield from arrow_rows(where, place, schema, data.with_format("arrow").iter(_ROWS_PER_BATCH))


def arrow_rows(
    where: str, place: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row. Raises DataError (exit 3), beginning with `where`, for media in a column."""
    for field in schema:
        if _holds_media(field.type):
            raise DataError(
                f"{where}: column {field.name} holds images or other media (a struct of bytes and path), and"
                " prompts are text only; leave the column out (in `datasets`: remove_columns)"
            )
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"{place}: row {number}", row) for number, row in enumerate(rows, start=1))


def _holds_media(kind: pa.DataType) -> bool:
    """Whether images, sound or the like are in it, at any depth: `datasets` has them all in one form."""
    inner = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    is_media = inner.keys() == {"bytes", "path"} and pa.types.is_binary(inner["bytes"])
    return is_media or any(map(_holds_media, inner.values()))


def folder_digest(path: Path, split: str) -> str:
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
        return datasets.load_dataset(found, config.subset, split=config.split)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        subset = f" (subset {config.subset})" if config.subset else ""
        raise DataError(f"{where}{subset}: cannot be loaded: {reason}") from None


def _split_of(config: PromptsConfig, saved: Any) -> "Dataset":
    """The configured split of what save_to_disk saved: several tables by name, or one without a name."""
    if config.subset is not None:
        raise ValueError("a saved data set has no subsets; leave prompts.subset out")
    tables = saved if isinstance(saved, dict) else {"train": saved, str(saved.split or "train"): saved}
    if config.split not in tables:
        raise ValueError(f"has no split {config.split}; there are {', '.join(tables)} (prompts.split)")
    return tables[config.split]
