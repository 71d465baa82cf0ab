"""sql: DuckDB over the tables of runs."""

from grpo.sql.connection import (
    MEMORY_GIB,
    VIEWS,
    Connection,
    connect,
    consult,
    create_view,
    own_text,
    query,
    read,
    register,
    rows,
    seed_random,
    turn_to,
)
from grpo.sql.run_tables import SETTINGS
from grpo.sql.user_sql import user_columns, user_rows

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
    "rows",
    "seed_random",
    "turn_to",
    "user_columns",
    "user_rows",
]
