"""advantage.own_sql: the user's estimator (`advantage.sql`) and condition (`advantage.where`)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql, tables
from grpo.artifacts import ActiveRun, Staging, keep_source
from grpo.config.named_files import named_file, named_text
from grpo.errors import DataError, UsageError

READ = ("rollouts", "rewards")  # outputs
SETTINGS = pa.schema(
    {"scale": "string", "epsilon": "float64", "pass_k": "int64", "batch_deviation": "float64"}
)
_KEY = ", ".join(tables.KEY)
_EXPECTED = f"{_KEY} must be integers and advantage a number"
_CONDITION_OF = (f"{_KEY}, advantage", "samples")


def is_given(run: ActiveRun) -> bool:
    """Whether the configuration has SQL of the user's."""
    return run.config.advantage.sql is not None or run.config.advantage.where is not None


def keep(run: ActiveRun, staging: Staging) -> None:
    """Keep the text of advantage.sql in the run."""
    if run.config.advantage.sql is not None:
        path = named_file(run.imports, "advantage.sql", run.config.advantage.sql)
        keep_source(run, staging.plan.user_files["advantage.sql"], path.name, path.read_bytes)


def check(run: ActiveRun) -> None:
    """Raise UsageError (exit 2) for SQL that cannot be run, whatever the tables will hold."""
    with sql.UserSql(run.console.stop_requested) as user_sql:
        for place, question in _questions(run, None, {}, SETTINGS.empty_table()):
            _check_columns(user_sql.columns(question, place), place)


def apply(
    run: ActiveRun,
    iteration: int,
    user_sql: sql.UserSql,
    weights: dict[str, float],
    settings: pa.Table,
    data: pa.Table,
) -> pa.Table:
    """`data`, the rows of `advantages`, after the user's estimator and condition.

    Raises UsageError (exit 2) for what is no query, ResourceError (7) over a limit, DataError (3).
    """
    for place, question in _questions(run, iteration, weights, settings):
        # As `advantages` the query sees `data` itself.
        asked = replace(question, tables={**question.tables, "_advantages_0": data})
        own = user_sql.rows(asked, place, run.config.sql_timeout_s).table()
        chosen = _chosen(data, own, place)
        left_out = question.condition_of is None and len(own) < len(data)  # which is what a condition is for
        if left_out and not chosen["keep"].equals(data["keep"]):
            rest = "the others are not trained on"
            run.console.say(f"advantage.sql returned {len(own)} of {len(data)} rollouts; {rest}")
        data = chosen
    return data


def _questions(
    run: ActiveRun, iteration: int | None, weights: dict[str, float], settings: pa.Table
) -> Iterator[tuple[str, sql.Question]]:
    """What the user's estimator and condition ask, in this order: where that is written, and the question.

    Both give the key and the advantage of the rollouts to be kept.
    """
    config = run.config.advantage
    shown = partial(
        sql.Question,
        runs=[run],
        iteration=iteration,
        outputs=() if iteration is None else READ,
        repeatable=True,
        weights=list(weights.values()),
        unrewarded=run.config.unrewarded,
        seed=(run.config.seed, iteration or 0),
        tables={"settings": settings},
    )
    if config.sql is not None:
        text = named_text(run.imports, "advantage.sql", config.sql)
        yield f"advantage.sql: {config.sql}", shown(text)
    if config.where is not None:
        yield "advantage.where", shown(config.where, condition_of=_CONDITION_OF)


def _check_columns(columns: list[str], name: str) -> None:
    missing = [column for column in (*tables.KEY, "advantage") if column not in columns]
    if missing:
        raise UsageError(f"{name}: returns no column {missing[0]}; it must return {_KEY}, advantage")


def _chosen(data: pa.Table, own: pa.Table, name: str) -> pa.Table:
    """`data` with the advantages of a user's query; rows that it leaves out are not kept (`filtered`)."""
    _check_columns(own.column_names, name)
    keys = list(tables.KEY)
    own = own.select([*keys, "advantage"]).rename_columns([*keys, "own"])
    for column in own.schema:  # Arrow would make numbers of text and of true and false
        if not tables.is_number(column.type):
            named = "advantage" if column.name == "own" else column.name
            raise DataError(f"{name}: {_EXPECTED}: {named} is of type {column.type}")
    if own.group_by(keys).aggregate([]).num_rows != own.num_rows:
        raise DataError(f"{name}: returns a rollout twice; it must return each ({_KEY}) once")
    try:
        own = own.cast(pa.schema([*((key, pa.int32()) for key in keys), ("own", pa.float64())]))
    except pa.ArrowException as error:
        raise DataError(f"{name}: {_EXPECTED}: {error}") from None
    if len(strange := own.join(data.select(keys), keys, join_type="left anti")):
        key = tuple(strange[column][0].as_py() for column in keys)
        raise DataError(f"{name}: returns ({_KEY}) {key}, which is no rollout of this iteration")
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
