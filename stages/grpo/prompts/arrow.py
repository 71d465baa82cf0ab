"""arrow: rows of prompts -> an Arrow table, with a type for each column of the user's own."""

from bisect import bisect_left
from contextlib import suppress
from typing import Any

import pyarrow as pa

from grpo import tables
from grpo.prompts.source import Row

_UNTYPED = (OverflowError, pa.ArrowInvalid, pa.ArrowTypeError)  # what Arrow raises where no type fits


def arrow_table(
    rows: list[Row], places: list[str], schema: pa.Schema | None = None, shard: int = 0
) -> pa.Table:
    """Rows as Arrow; later shards take the `schema` of the first, of `shard` rows.

    Raises ValueError, naming one of `places`, or what Arrow does.
    """
    fixed = tables.schema("prompts")
    names = dict.fromkeys(name for row in rows for name in row if name not in fixed.names)
    if alike := [name for name in names if [each.lower() for each in names].count(name.lower()) > 1]:
        pair = f"columns {alike[0]} and {alike[1]}"
        raise ValueError(f"{pair} differ by case alone, which SQL does not tell apart; rename one")
    messages = _messages_type(rows, places, fixed.field("messages").type)
    own = ((name, _type_of([row.get(name) for row in rows], f"column {name}", places)) for name in names)
    found = pa.schema([field if field.name != "messages" else ("messages", messages) for field in fixed])
    found = pa.schema([*found, *own])
    if schema is None:
        return pa.Table.from_pylist(rows, schema=found)
    # from_pylist leaves out what the schema does not have, and makes 1 of 1.5 where it says integer.
    for field in pa.unify_schemas([schema, found], promote_options="permissive"):
        kind = found.field(field.name).type if field.name in found.names else field.type
        # Arrow would have 2^63 as an int64.
        if field not in list(schema) or (pa.types.is_uint64(kind) and not pa.types.is_uint64(field.type)):
            raise ValueError(
                f"column {field.name} is of type {kind if field in list(schema) else field.type} only behind"
                f" the first {shard:,} rows; give every row the same columns, of the same types"
            )
    return pa.Table.from_pylist(rows, schema=schema)


def _messages_type(rows: list[Row], places: list[str], usual: pa.DataType) -> pa.DataType:
    """Of messages: role and content, and behind them the fields that any message has."""
    messages = [
        (place, each) for place, row in zip(places, rows, strict=True) for each in row["messages"] or ()
    ]
    known = {field.name for field in usual.value_type}
    names = dict.fromkeys(name for _, message in messages for name in message if name not in known)
    where = [place for place, _ in messages]
    own = (
        (name, _type_of([message.get(name) for _, message in messages], f"field {name} of messages", where))
        for name in names
    )
    return pa.list_(pa.struct([*usual.value_type, *own])) if names else usual


def _type_of(values: list[Any], what: str, places: list[str]) -> pa.DataType:
    """The type that all values have. Raises ValueError with the line of the first that has another."""
    try:
        return pa.array(values).type
    except _UNTYPED as error:
        reason = error
    if isinstance(reason, OverflowError):
        with suppress(*_UNTYPED):
            return pa.array(values, pa.uint64()).type
    first = bisect_left(range(len(values)), True, key=lambda end: not _have_type(values[: end + 1]))
    if isinstance(reason, OverflowError):
        problem = "integers outside -2^63 to 2^63 - 1; make them text"
    else:
        problem = f"values of several types: {reason}"
    raise ValueError(f"{what} holds {problem} (first at {places[first]})")


def _have_type(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except _UNTYPED:
        return False
    return True
