"""sql: DuckDB over the tables of runs."""

from grpo.sql.connection import (
    MEMORY_GIB,
    SETTINGS,
    VIEWS,
    Connection,
    connect,
    consult,
    create_view,
    own_text,
    query,
    read,
    register,
    seed_random,
    user_columns,
    user_rows,
)

__all__ = [
    "MEMORY_GIB",
    "SETTINGS",
    "VIEWS",
    "Connection",
    "connect",
    "consult",
    "create_view",
    "own_text",
    "query",
    "read",
    "register",
    "seed_random",
    "user_columns",
    "user_rows",
]
