"""advantage: rollouts + rewards -> advantages.

SQL over the tables of the iteration: scored.sql, a file of estimators/, then advantage.sql. All selection
happens here: update trains on exactly the rows with keep = true.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql, tables
from grpo.advantage import own_sql
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
    read_rollouts,
)
from grpo.config import AdvantageConfig
from grpo.errors import CorruptError, DataError

BLOCK_ROWS = 2**20  # rollouts computed at a time
_KEY = ", ".join(tables.KEY)
# Filled with files of this package, whose braces format() does not read: nothing of a user's gets here.
_QUERY = (
    "with scored as materialized (select * from _scored), estimated as (\n{estimator}\n),\n"
    f"fresh_or_not as (\n{{kept}})\nselect * from {{aged}} order by {_KEY}"
)
_RESTRICTED = ("maxrl", "pass_at_k")  # estimators that cannot take every reward: refused.sql says which
_OVER_ALL = ("gdpo", "reinforce_pp")  # estimators with moments of the whole iteration


class Tool(NamedTuple):
    """What stays open between iterations: our connection, and the process for what the user wrote."""

    connection: sql.Connection
    user_sql: sql.UserSql


@contextmanager
def open_resource(run: ActiveRun, lend: object) -> Iterator[Tool]:
    """A connection for all iterations: it is opened in 30 ms, and used in 10."""
    reading = sql.connect([run], range(0), own_sql.READ)
    with reading as connection, sql.UserSql(run.console.stop_requested) as user:
        sql.create_scored(connection, [reward.weight for reward in run.config.score.rewards])
        sql.register(connection, "settings", own_sql.SETTINGS.empty_table())
        yield Tool(connection, user)


def release(opened: Tool) -> None:
    """Nothing is kept on an accelerator."""


def after(run: Run, manifest: Manifest, opened: Tool) -> None:
    """Nothing follows from committed advantages."""


def produce(run: ActiveRun, iteration: int, staging: Staging, opened: Tool) -> Product:
    """The `advantages` of one iteration."""
    own_sql.keep(run, staging)
    for name in own_sql.READ:
        for file in run.require(name, iteration, f"grpo {NAME}").files:
            if file.table == name:
                run.verify(file, run.path_of(file, name, iteration))
    if not all(are_own(run, output, iteration) for output in own_sql.READ):
        _check_inputs(run, iteration)
    records, kept, zero, scored, total, last = [], 0, 0, 0, 0.0, -1
    dropped: Counter[str] = Counter()
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
            dropped.update(
                {each["values"]: each["counts"] for each in data["reason"].value_counts().to_pylist()}
            )
    _check_rows(run, iteration, sum(record.rows or 0 for record in records))
    if not kept:
        _say_why(run, iteration, dropped)
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


def _say_why(run: ActiveRun, iteration: int, dropped: Counter[str]) -> None:
    """Say why no rollout is kept. DataError (exit 3) where, in iteration 0, no reward applies to any."""
    rewards = run.require("rewards", iteration, "grpo score")
    why = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
    if not any(rewards.summary["weights"].values()):  # then the rewards that there are make no sum
        why = "every reward has weight 0, and counts for nothing"
    text = f"advantage {iteration}: no rollout is kept ({why}), so update has nothing to learn from"
    given = {status for status, number in rewards.summary.get("statuses", {}).items() if number}
    if given != {"not_applicable"}:
        run.console.say(text)
        return
    answers = run.read("prompts", None, ["answer"])["answer"]
    column = "no row of `prompts` has an `answer`: name its column in prompts.columns.answer, or"
    way = f"{column if answers.null_count == len(answers) else ''} take a reward that fits the prompts"
    text += f"; {', '.join(rewards.summary['weights'])} applied to none of them; {way.strip()}"
    if iteration == 0:
        raise DataError(text)
    run.console.say(text)


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Raise UsageError (exit 2) for SQL of the user's that cannot be run, whatever the tables will hold."""
    if own_sql.is_given(run):
        own_sql.check(run)


def _advantages(run: ActiveRun, iteration: int, opened: Tool) -> Iterator[pa.Table]:
    """The rows of `advantages` in key order, a block of whole groups at a time: memory stays bounded."""
    config, connection = run.config.advantage, opened.connection
    rewards = run.require("rewards", iteration, "grpo score")
    sql.show_iteration(connection, iteration)
    weights = rewards.summary["weights"]
    sql.set_weights(connection, weights.values(), unrewarded=run.config.unrewarded)
    sql.limit_scored(connection)
    values = config.model_dump(include={"scale", "epsilon", "pass_k"}) | {"batch_deviation": None}
    if config.scale == "batch":
        values |= sql.rows(connection, "advantage/batch_deviation")[0]
    settings = pa.Table.from_pylist([values], own_sql.SETTINGS)
    sql.register(connection, "settings", settings)
    _refuse(connection, config.estimator)
    blocks = (
        _estimated(connection, config, first, last) for first, last in _blocks(run, iteration, connection)
    )
    if own_sql.is_given(run):
        data = pa.concat_tables(blocks)
        yield own_sql.apply(run, iteration, opened.user_sql, weights, settings, data)
    else:
        yield from blocks


def _estimated(connection: sql.Connection, config: AdvantageConfig, first: int, last: int) -> pa.Table:
    """The rows of the groups `first` to `last`; both queries read `scored`, which is computed once."""
    sql.limit_scored(connection, first, last)
    estimator = sql.own_text(f"advantage/estimators/{config.estimator}")
    aged = "fresh_or_not" if config.max_policy_lag is None else f"({sql.own_text('advantage/stale')})"
    query = _QUERY.format(estimator=estimator, kept=sql.own_text("advantage/advantage"), aged=aged)
    parameters = {"drop_zero_variance", "truncated", "max_policy_lag"}
    return sql.query(connection, query, config.model_dump(include=parameters))


def _refuse(connection: sql.Connection, estimator: str) -> None:
    """Raise DataError (exit 3) for the first rollout that the estimator cannot take."""
    if estimator in _RESTRICTED:
        for refused in sql.rows(connection, "advantage/estimators/refused", estimator=estimator):
            raise DataError(f"advantage: rollout {tables.key_text(refused)} {refused['problem']}")


def _check_keys(data: pa.Table, last: int) -> int:
    """The last key of rows in key order, as a number; last: of those before. Raises CorruptError (exit 6)."""
    group, sample = (data[name].to_numpy() for name in ("group_id", "sample_id"))
    # Both are int32, and no key is negative: the product of 2^62 at most leaves room for the sample.
    keys = np.concatenate([[last], group.astype(np.int64) * 2**31 + sample])
    if len(wrong := np.flatnonzero(np.diff(keys) <= 0)):
        [key] = map(tables.key_text, data.slice(int(wrong[0]), 1).to_pylist())
        raise CorruptError(f"rollouts or rewards: rollout {key} occurs twice; see `grpo verify`")
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
            [key] = map(tables.key_text, data.filter(pc.invert(finite)).slice(0, 1).to_pylist())
            raise DataError(f"advantage: {name} of rollout {key} is not finite; scale the rewards down")


def _blocks(run: ActiveRun, iteration: int, connection: sql.Connection) -> Iterator[tuple[int, int]]:
    """First and last group of each block of about BLOCK_ROWS rollouts."""
    rows = run.require("rollouts", iteration, f"grpo {NAME}").rows
    if rows <= BLOCK_ROWS or run.config.advantage.estimator in _OVER_ALL:
        yield 0, sql.LAST_GROUP  # which costs no query
        return
    [size] = sql.query(connection, "select max(group_id) + 1 as groups from rollouts").to_pylist()
    step = max(1, BLOCK_ROWS * size["groups"] // rows)
    for first in range(0, size["groups"], step):
        yield first, first + step - 1
