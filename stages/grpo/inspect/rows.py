"""rows: the result of a query in Python, in the form that the caller works with."""

from collections.abc import Iterator
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo.console import PLAIN_WIDTH, table
from grpo.errors import UsageError

if TYPE_CHECKING:
    import pandas
    import polars

_WHOLE = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_SHOWN = 20


class Rows:
    """Rows of a query: `.df()` for pandas, `.pl()` for polars, `.arrow()`, or `.rows()` for plain Python."""

    def __init__(self, data: pa.Table) -> None:
        self._data = data

    def __len__(self) -> int:
        return int(self._data.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows())

    def __repr__(self) -> str:
        from rich.console import Console

        first = self._data.slice(0, _SHOWN).to_pylist(maps_as_pydicts="strict")
        text = StringIO()
        shown = table(self.columns, [[_cell(value) for value in row.values()] for row in first], plain=True)
        Console(file=text, width=PLAIN_WIDTH, color_system=None, force_jupyter=False).print(shown)
        return f"{text.getvalue()}{len(self):,} rows, {len(self.columns)} columns"

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self._data.column_names)

    def arrow(self) -> pa.Table:
        """As they were read, with their types."""
        return self._data

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each row; `rewards` and other maps are dicts too."""
        found: list[dict[str, Any]] = self._data.to_pylist(maps_as_pydicts="strict")
        return found

    def df(self) -> "pandas.DataFrame":
        """A pandas DataFrame: whole numbers and truth values stay so where some are missing; maps are dicts.

        Raises UsageError where pandas is not installed.
        """
        pandas: Any = _library("df", "pandas")
        names = {kind: str(kind).replace("int", "Int").replace("u", "U") for kind in _WHOLE}
        names[pa.bool_()] = "boolean"
        dtypes = {kind: pandas.api.types.pandas_dtype(name) for kind, name in names.items()}
        frame: pandas.DataFrame = self._data.to_pandas(types_mapper=dtypes.get, maps_as_pydicts="strict")
        return frame

    def pl(self) -> "polars.DataFrame":
        """A polars DataFrame, maps as lists of {key, value}. Raises UsageError where polars is missing."""
        frame: polars.DataFrame = _library("pl", "polars").from_arrow(self._data)
        return frame


def _library(method: str, name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UsageError(
            f".{method}(): {name} is not installed; pip install {name}, or use .arrow()"
        ) from None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
