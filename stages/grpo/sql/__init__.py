"""sql: DuckDB over the tables of runs."""

from grpo.sql.connection import (
    LAST_GROUP,
    Connection,
    connect,
    consult,
    create_scored,
    limit_scored,
    own_text,
    query,
    read,
    register,
    rows,
    seed_random,
    tell_weights,
    turn_to,
    user_columns,
    user_rows,
)
from grpo.sql.run_tables import SETTINGS

__all__ = [
    "LAST_GROUP",
    "SETTINGS",
    "Connection",
    "connect",
    "consult",
    "create_scored",
    "limit_scored",
    "own_text",
    "query",
    "read",
    "register",
    "rows",
    "seed_random",
    "tell_weights",
    "turn_to",
    "user_columns",
    "user_rows",
]
