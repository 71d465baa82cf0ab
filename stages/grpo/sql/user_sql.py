"""user_sql: queries that the user wrote into files or keys of the configuration; errors name the key."""

from typing import Any

import pyarrow as pa

from grpo.errors import ResourceError, UsageError
from grpo.sql.connection import Connection, columns, parameters_in, query


def user_rows(
    connection: Connection, key: str, statement: str, parameters: dict[str, Any] | None = None
) -> pa.Table:
    """Rows of the user's query, which may use any of `parameters`; raises what query() does, naming `key`."""
    try:
        return query(connection, statement, _used(connection, statement, parameters or {}))
    except (UsageError, ResourceError) as error:
        raise type(error)(f"{key}: {error}") from None


def user_columns(
    connection: Connection, key: str, statement: str, parameters: dict[str, Any] | None = None
) -> list[str]:
    """The columns that the user's query would give; computes nothing, and raises what user_rows() does."""
    try:
        return columns(connection, statement, _used(connection, statement, parameters or {}))
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


def _used(connection: Connection, statement: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that the statement names: DuckDB refuses the others."""
    names = parameters_in(connection, statement)
    return {name: value for name, value in parameters.items() if name in names}
