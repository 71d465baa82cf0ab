"""sql: DuckDB over the tables of runs; what a user wrote works in a process of its own."""

from grpo.sql.connection import (
    LAST_GROUP,
    Connection,
    connect,
    create_scored,
    limit_scored,
    own_text,
    query,
    read,
    register,
    rows,
    seed_random,
    set_weights,
    show_iteration,
    snapshot,
)
from grpo.sql.guarded import TIMEOUT_S, Rows, UserSql
from grpo.sql.question import Question
from grpo.sql.run_tables import SETTINGS

__all__ = [
    "LAST_GROUP",
    "SETTINGS",
    "TIMEOUT_S",
    "Connection",
    "Question",
    "Rows",
    "UserSql",
    "connect",
    "create_scored",
    "limit_scored",
    "own_text",
    "query",
    "read",
    "register",
    "rows",
    "seed_random",
    "set_weights",
    "show_iteration",
    "snapshot",
]
