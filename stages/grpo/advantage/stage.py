"""advantage: rollouts + rewards -> advantages.

SQL over the tables of the iteration: scored.sql, a file of estimators/, then advantage.sql. All selection
happens here: update trains on exactly the rows with keep = true.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql, tables
from grpo.advantage.plan import NAME, OUTPUT
from grpo.artifacts import ActiveRun, Manifest, Product, Run, Staging, id_of
from grpo.config import AdvantageConfig
from grpo.config.named_files import named_text
from grpo.errors import DataError, UsageError

BLOCK_ROWS = 2**20  # rollouts computed at a time
_KEY = ", ".join(tables.KEY)
_QUERY = (
    "with scored as materialized (select * from _scored), estimated as (\n{estimator})\n"
    f"select * from (\n{{kept}}) order by {_KEY}"
)
_SETTINGS = pa.schema(
    {"scale": "string", "epsilon": "float64", "pass_k": "int64", "batch_deviation": "float64"}
)
_CHOOSY = ("maxrl", "pass_at_k")  # estimators that refused.sql knows
_OVER_ALL = ("gdpo", "reinforce_pp")  # estimators with moments of the whole iteration


@contextmanager
def open_resource(run: ActiveRun) -> Iterator[sql.Connection]:
    """A connection for all iterations: it is opened in 30 ms, and used in 10."""
    with sql.connect([run], range(0), ("rollouts", "rewards")) as connection:
        _create_views(run, connection)
        yield connection


def release(opened: sql.Connection) -> None:
    """Nothing is kept on an accelerator."""


def after(run: Run, manifest: Manifest, opened: sql.Connection) -> None:
    """Nothing follows from committed advantages."""


def produce(run: ActiveRun, iteration: int, staging: Staging, opened: sql.Connection) -> Product:
    """The `advantages` of one iteration."""
    for name in ("rollouts", "rewards"):
        for file in run.require(name, iteration, f"grpo {NAME}").files:
            if file.table == name:
                run.verify(file, run.path_of(file, name, iteration))
    records, kept, zero, scored, total = [], 0, 0, 0, 0.0
    dropped: Counter[str] = Counter()
    with staging.clock("advantage"):
        for index, data in enumerate(_advantages(run, iteration, opened)):
            data = data.cast(tables.schema(OUTPUT))
            _check_finite(data)
            records.append(staging.write_table(OUTPUT, staging.file_name("part", index), data))
            kept += pc.sum(data["keep"]).as_py() or 0
            zero += pc.sum(pc.equal(data["advantage"], 0.0)).as_py() or 0
            scored += pc.count(data["reward"]).as_py()
            total += pc.sum(data["reward"]).as_py() or 0.0
            dropped.update(
                {each["values"]: each["counts"] for each in data["reason"].value_counts().to_pylist()}
            )
    if not kept:
        _say_why(run, iteration, dropped)
    reward_mean = total / scored if scored else None
    summary = {"kept": kept, "zero_advantage": zero, "scored": scored, "reward_mean": reward_mean}
    return Product({OUTPUT: id_of(records)}, records, summary)


def _say_why(run: ActiveRun, iteration: int, dropped: Counter[str]) -> None:
    """Say why no rollout is kept. DataError (exit 3) where, in iteration 0, no reward applies to any."""
    why = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
    text = f"advantage {iteration}: no rollout is kept ({why}), so update has nothing to learn from"
    rewards = run.require("rewards", iteration, "grpo score")
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
    if not (queries := _user_queries(run)):
        return
    with sql.connect([run], outputs=()) as connection:
        _create_views(run, connection)
        for key, (name, text) in queries.items():
            _check_columns(sql.user_columns(connection, key, text), name)


def _create_views(run: ActiveRun, connection: sql.Connection) -> None:
    """What the queries of the stage and the user's read beside the tables: `scored` and `settings`."""
    sql.create_scored(connection, [reward.weight for reward in run.config.score.rewards])
    sql.register(connection, "settings", _SETTINGS.empty_table())


def _user_queries(run: ActiveRun) -> dict[str, tuple[str, str]]:
    """What the user's estimator and condition ask, in this order: key -> (name for errors, query).

    Both give the key and the advantage of the rollouts to be kept.
    """
    config, queries = run.config.advantage, {}
    if config.sql is not None:
        queries["advantage.sql"] = config.sql, named_text(run.imports, "advantage.sql", config.sql)
    if config.where is not None:
        query = f"select {_KEY}, advantage from samples where ({config.where})"
        queries["advantage.where"] = "advantage.where", query
    return queries


def _advantages(run: ActiveRun, iteration: int, connection: sql.Connection) -> Iterator[pa.Table]:
    """The rows of `advantages` in key order, a block of whole groups at a time: memory stays bounded."""
    config = run.config.advantage
    rewards = run.require("rewards", iteration, "grpo score")
    sql.turn_to(connection, iteration)
    weights = rewards.summary["weights"].values()
    sql.tell_weights(connection, weights, unrewarded=run.config.unrewarded)
    sql.limit_scored(connection)
    settings = config.model_dump(include={"scale", "epsilon", "pass_k"}) | {"batch_deviation": None}
    if config.scale == "batch":
        settings |= sql.rows(connection, "advantage/batch_deviation")[0]
    sql.register(connection, "settings", pa.Table.from_pylist([settings], _SETTINGS))
    _refuse(connection, config.estimator)
    blocks = (
        _estimated(connection, config, first, last) for first, last in _blocks(run, iteration, connection)
    )
    if not (queries := _user_queries(run)):
        yield from blocks
        return
    data = pa.concat_tables(blocks)
    sql.limit_scored(connection)
    for key, (name, query) in queries.items():
        sql.register(connection, "_advantages_0", data)  # as `advantages` the query sees `data` itself
        data = _chosen(data, sql.user_rows(connection, key, query), name)
    yield data


def _estimated(connection: sql.Connection, config: AdvantageConfig, first: int, last: int) -> pa.Table:
    """The rows of the groups `first` to `last`; both queries read `scored`, which is computed once."""
    sql.limit_scored(connection, first, last)
    estimator = sql.own_text(f"advantage/estimators/{config.estimator}")
    query = _QUERY.format(estimator=estimator, kept=sql.own_text("advantage/advantage"))
    return sql.query(connection, query, config.model_dump(include={"drop_zero_variance", "truncated"}))


def _refuse(connection: sql.Connection, estimator: str) -> None:
    """Raise DataError (exit 3) for the first rollout that the estimator cannot take."""
    if estimator in _CHOOSY:
        for refused in sql.rows(connection, "advantage/estimators/refused", estimator=estimator):
            key = tuple(refused[column] for column in tables.KEY)
            raise DataError(f"advantage: rollout ({_KEY}) {key} {refused['problem']}")


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
