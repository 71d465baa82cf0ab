"""scored: rollouts + rewards of one iteration -> the reward of each rollout, and whether it counts.

What a reward is and which rollouts are compared is said in scored.sql alone: advantage, and score where it
counts groups for generate.dynamic_sampling, take it from here.
"""

from collections.abc import Collection

import pyarrow as pa

from grpo import sql


def create_scored(connection: sql.Connection, weights: Collection[float]) -> None:
    """Make the view `scored` in a connection to the tables of one iteration; weights: of its rewards."""
    tell_weights(connection, weights)
    sql.create_view(connection, "scored", sql.own_text("sql/views/scored"))


def tell_weights(connection: sql.Connection, weights: Collection[float]) -> None:
    """Have a view `scored` that is there go by other weights."""
    number = sum(weight != 0 for weight in weights)
    sql.register(connection, "reward_names", pa.table({"number": [number]}))


def count_signal(connection: sql.Connection) -> int:
    """How many groups have signal: scored rollouts whose rewards differ. Needs `scored`."""
    [row] = sql.query(connection, sql.own_text("sql/views/signal")).to_pylist()
    return int(row["groups_with_signal"])
