"""advantage: rollouts + rewards -> advantages.

SQL over the tables of the iteration: scored.sql, then advantage.sql. All selection happens here: update
trains on exactly the rows with keep = true.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql, tables
from grpo.advantage.plan import NAME, OUTPUT
from grpo.artifacts import (
    ActiveRun,
    Manifest,
    Product,
    Run,
    Staging,
    are_own,
    check_keys,
    id_of,
    keep_source,
    read_rollouts,
)
from grpo.config.named_files import named_file, named_text
from grpo.errors import CorruptError, DataError, UsageError

BLOCK_ROWS = 2**20  # rollouts computed at a time
_KEY = ", ".join(tables.KEY)
_READ = ("rollouts", "rewards")  # outputs
_CONDITION_OF = f"select {_KEY}, advantage from samples"


class Tool(NamedTuple):
    """What stays open between iterations: our connection, and the process for what the user wrote."""

    connection: sql.Connection
    user_sql: sql.UserSql


@contextmanager
def open_resource(run: ActiveRun) -> Iterator[Tool]:
    """A connection for all iterations: it is opened in 30 ms, and used in 10."""
    with sql.connect([run], range(0), _READ) as connection, sql.UserSql(run.console.stop_requested) as user:
        sql.create_scored(connection, [reward.weight for reward in run.config.score.rewards])
        yield Tool(connection, user)


def release(opened: Tool) -> None:
    """Nothing is kept on an accelerator."""


def after(run: Run, manifest: Manifest, opened: Tool) -> None:
    """Nothing follows from committed advantages."""


def produce(run: ActiveRun, iteration: int, staging: Staging, opened: Tool) -> Product:
    """The `advantages` of one iteration."""
    if run.config.advantage.sql is not None:
        path = named_file(run.imports, "advantage.sql", run.config.advantage.sql)
        keep_source(run, staging.plan.user_files["advantage.sql"], path.name, path.read_bytes)
    for name in _READ:
        for file in run.require(name, iteration, f"grpo {NAME}").files:
            if file.table == name:
                run.verify(file, run.path_of(file, name, iteration))
    if not all(are_own(run, output, iteration) for output in ("rollouts", "rewards")):
        _check_inputs(run, iteration)
    records, kept, zero, scored, total, last = [], 0, 0, 0, 0.0, -1
    with staging.clock("advantage"):
        for index, data in enumerate(_advantages(run, iteration, opened)):
            data = data.cast(tables.schema(OUTPUT))
            _check_finite(data)
            last = _check_keys(data, last)
            records.append(staging.write_table(OUTPUT, staging.file_name("part", index), data))
            kept += pc.sum(data["keep"]).as_py() or 0
            zero += pc.sum(pc.equal(data["advantage"], 0.0)).as_py() or 0
            scored += pc.count(data["reward"]).as_py()
            total += pc.sum(data["reward"]).as_py() or 0.0
    _check_rows(run, iteration, sum(record.rows or 0 for record in records))
    if not kept:
        run.console.say(f"advantage {iteration}: no rollout is kept, so update has nothing to learn from")
    reward_mean = total / scored if scored else None
    summary = {"kept": kept, "zero_advantage": zero, "scored": scored, "reward_mean": reward_mean}
    return Product({OUTPUT: id_of(records)}, records, summary)


def _check_inputs(run: Run, iteration: int) -> None:
    """Raise CorruptError (exit 6) unless there is one of each reward for each rollout, as they were made."""
    rollouts = read_rollouts(run, iteration).select(list(tables.KEY))
    rewards = run.read("rewards", iteration, [*tables.KEY, "name"])
    place = run.folder("rewards", iteration)
    summary = run.require("rewards", iteration, "grpo score").summary
    for name in summary["weights"] if "statuses" in summary else ():  # which count every row that was made
        check_keys(f"{place}: {name}", rewards.filter(pc.equal(rewards["name"], name)), rollouts)


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Raise UsageError (exit 2) for SQL of the user's that cannot be run, whatever the tables will hold."""
    config = run.config.advantage
    if config.sql is None and config.where is None:
        return
    with sql.UserSql() as user_sql:
        for place, question in _questions(run, None, {}):
            _check_columns(user_sql.columns(question, place), place)


def _questions(
    run: ActiveRun, iteration: int | None, weights: dict[str, float]
) -> Iterator[tuple[str, sql.Question]]:
    """What the user's estimator and condition ask, in this order: where that is written, and the question.

    Both give the key and the advantage of the rollouts to be kept.
    """
    config = run.config.advantage
    shown = partial(
        sql.Question,
        runs=[run],
        iteration=iteration,
        outputs=() if iteration is None else _READ,
        repeatable=True,
        weights=list(weights.values()),
        seed=(run.config.seed, iteration or 0),
    )
    if config.sql is not None:
        text = named_text(run.imports, "advantage.sql", config.sql)
        yield f"advantage.sql: {config.sql}", shown(text)
    if config.where is not None:
        yield "advantage.where", shown(config.where, condition_of=_CONDITION_OF)


def _advantages(run: ActiveRun, iteration: int, opened: Tool) -> Iterator[pa.Table]:
    """The rows of `advantages` in key order, a block of whole groups at a time: memory stays bounded."""
    config, connection = run.config.advantage, opened.connection
    rewards = run.require("rewards", iteration, "grpo score")
    sql.turn_to(connection, iteration)
    sql.tell_weights(connection, rewards.summary["weights"].values())
    parameters = config.model_dump(include={"scale", "epsilon", "drop_zero_variance", "truncated"})
    parameters["batch_deviation"] = None
    if config.scale == "batch":
        parameters |= sql.query(connection, sql.own_text("advantage/batch_deviation")).to_pylist()[0]
    text = sql.own_text("advantage/advantage")
    blocks = (
        sql.query(connection, text, {**parameters, "first_group": first, "last_group": last})
        for first, last in _blocks(run, iteration, connection)
    )
    if config.sql is None and config.where is None:
        yield from blocks
        return
    data = pa.concat_tables(blocks)
    for place, question in _questions(run, iteration, rewards.summary["weights"]):
        # As `advantages` the query sees `data` itself.
        asked = replace(question, tables={"_advantages_0": data})
        data = _chosen(data, opened.user_sql.rows(asked, place).table(), place)
    yield data


def _check_keys(data: pa.Table, last: int) -> int:
    """The last key of rows in key order, as a number; last: of those before. Raises CorruptError (exit 6)."""
    group, sample = (data[name].to_numpy() for name in ("group_id", "sample_id"))
    keys = np.concatenate([[last], group.astype(np.int64) * 2**31 + sample])
    if len(wrong := np.flatnonzero(np.diff(keys) <= 0)):
        key = tuple(data[name][int(wrong[0])].as_py() for name in tables.KEY)
        raise CorruptError(f"rollouts or rewards: rollout ({_KEY}) {key} occurs twice; see `grpo verify`")
    return int(keys[-1])


def _check_rows(run: Run, iteration: int, rows: int) -> None:
    """Raise CorruptError (exit 6) where not each rollout has one row of advantages."""
    rollouts = run.require("rollouts", iteration, f"grpo {NAME}").rows
    if rows != rollouts:
        raise CorruptError(f"advantages: {rows} rows for {rollouts} rollouts; see `grpo verify`")


def _check_finite(data: pa.Table) -> None:
    """Raise DataError (exit 3) for sums or deviations beyond float64: their advantages would be 0 or nan."""
    for name in ("reward", "group_mean", "group_std", "advantage"):
        finite = pc.fill_null(pc.is_finite(data[name]), True)
        if not pc.all(finite).as_py():
            wrong = data.filter(pc.invert(finite))
            key = tuple(wrong[column][0].as_py() for column in tables.KEY)
            raise DataError(
                f"advantage: {name} of rollout ({_KEY}) {key} is not finite; scale the rewards down"
            )


def _blocks(run: Run, iteration: int, connection: sql.Connection) -> Iterator[tuple[int, int]]:
    """First and last group of each block of about BLOCK_ROWS rollouts."""
    rows = run.require("rollouts", iteration, f"grpo {NAME}").rows
    if rows <= BLOCK_ROWS:
        yield 0, 2**31 - 1  # all that group_id can be, which costs no query
        return
    [size] = sql.query(connection, "select max(group_id) + 1 as groups from rollouts").to_pylist()
    step = max(1, BLOCK_ROWS * size["groups"] // rows)
    for first in range(0, size["groups"], step):
        yield first, first + step - 1


def _check_columns(columns: list[str], name: str) -> None:
    missing = [column for column in (*tables.KEY, "advantage") if column not in columns]
    if missing:
        raise UsageError(f"{name}: returns no column {missing[0]}; it must return {_KEY}, advantage")


def _chosen(data: pa.Table, own: pa.Table, name: str) -> pa.Table:
    """`data` with the advantages of a user's query; rows that it leaves out are not kept (`filtered`)."""
    _check_columns(own.column_names, name)
    keys = list(tables.KEY)
    own = own.select([*keys, "advantage"]).rename_columns([*keys, "own"])
    if own.group_by(keys).aggregate([]).num_rows != own.num_rows:
        raise DataError(f"{name}: returns a rollout twice; it must return each ({_KEY}) once")
    try:
        own = own.cast(pa.schema([*((key, pa.int32()) for key in keys), ("own", pa.float64())]))
    except pa.ArrowException as error:
        raise DataError(f"{name}: {_KEY} must be integers and advantage a number: {error}") from None
    joined = data.join(own, keys).sort_by([(key, "ascending") for key in keys])
    if not pc.all(pc.fill_null(pc.is_finite(joined["own"]), True)).as_py():
        raise DataError(f"{name}: returns an advantage that is nan or infinite")
    keep = pc.and_(joined["keep"], pc.is_valid(joined["own"]))
    columns = {
        "advantage": pc.if_else(keep, joined["own"], None),
        "keep": keep,
        "reason": pc.if_else(pc.xor(joined["keep"], keep), "filtered", joined["reason"]),
    }
    for column, values in columns.items():
        joined = joined.set_column(joined.schema.get_field_index(column), column, values)
    return joined.select(data.column_names)
