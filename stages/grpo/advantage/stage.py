"""advantage: rollouts + rewards -> advantages.

SQL over the tables of the iteration: judged.sql, then advantage.sql. All selection happens here: update
trains on exactly the rows with keep = true.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql, tables
from grpo.artifacts import Manifest, Plan, Run, Staging, id_of, lacking
from grpo.artifacts.files import sha256_of
from grpo.errors import DataError, InputError, UsageError
from grpo.sql.scored import create_judged

NAME = "advantage"
OUTPUT = "advantages"
STAGE_VERSION = 2  # 2: sums of three rewards and more are compensated, which may change the last bit
BLOCK_ROWS = 2**20  # rollouts computed at a time
_KEY = ", ".join(tables.KEY)


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when an input is missing or partial."""
    config = run.config.advantage
    rollouts = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    rewards = run.require("rewards", iteration, f"grpo score --iteration {iteration}")
    if why := lacking(run, rewards):
        raise InputError(f"{run.folder('rewards', iteration)}: {why}; {_way_on(rewards)}")
    if why := lacking(run, rollouts):
        raise InputError(f"{run.folder('rollouts', iteration)}: {why}; {_way_on(rollouts)}")
    sources = {}
    if config.sql is not None:
        sources["advantage.sql"] = sha256_of(sql.user_file(run, "advantage.sql", config.sql))
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"advantage": config.model_dump()},
        reads=_reads(run, iteration, rewards),
        sources=sources,
    )


def _way_on(manifest: Manifest) -> str:
    """What to do about an output that lacks something."""
    command = f"`grpo {manifest.stage} --iteration {manifest.iteration}`"
    if manifest.stage == "generate":
        return f"{command} samples another round, `generate.resample: null` goes on with these"
    if manifest.summary["failed"]:
        return f"{command} tries them again, `score.on_error: drop` leaves them out"
    return f"{command} scores the others"


def _reads(run: Run, iteration: int, rewards: Manifest) -> dict[str, str]:
    """Ids of the inputs. A reward of weight 0 counts only for a user's own SQL, which may look at it."""
    config = run.config.advantage
    own_sql = config.where is not None or config.sql is not None
    weights: dict[str, float] = rewards.summary["weights"]
    names = [f"reward/{name}@{iteration}" for name in weights if own_sql or weights[name] != 0]
    references = [f"rollouts@{iteration}", *names, *(["prompts"] if own_sql else [])]
    return {reference: run.id_of(reference) or "" for reference in references}


@contextmanager
def open_tool(run: Run) -> Iterator[None]:
    """Nothing is kept open: a connection sees the files that were there when it was made."""
    yield


def release(tool: None) -> None:
    """Nothing is kept on an accelerator."""


def run(run: Run, iteration: int, staging: Staging, tool: None) -> Manifest:
    """Write and commit `advantages` of one iteration."""
    for table, output in (("rollouts", "rollouts"), ("rewards", "rewards")):
        for file in run.require(output, iteration, f"grpo {NAME}").files:
            if file.table == table:
                run.verify(file, run.path_of(file, output, iteration))
    records, kept, zero, scored, total = [], 0, 0, 0, 0.0
    with staging.clock("advantage"):
        for index, data in enumerate(_advantages(run, iteration)):
            data = data.cast(tables.schema(OUTPUT))
            _check_finite(data)
            records.append(staging.write_table(OUTPUT, staging.file_name("part", index), data))
            kept += pc.sum(data["keep"]).as_py() or 0
            zero += pc.sum(pc.equal(data["advantage"], 0.0)).as_py() or 0
            scored += pc.count(data["reward"]).as_py()
            total += pc.sum(data["reward"]).as_py() or 0.0
    if not kept:
        run.console.say(f"advantage {iteration}: no rollout is kept, so update has nothing to learn from")
    reward_mean = total / scored if scored else None
    summary = {"kept": kept, "zero_advantage": zero, "scored": scored, "reward_mean": reward_mean}
    return staging.commit({OUTPUT: id_of(records)}, records, summary)


def check(run: Run) -> None:
    """Raise UsageError (exit 2) for SQL of the user's that cannot be run, whatever the tables will hold."""
    config = run.config.advantage
    if config.sql is None and config.where is None:
        return
    with sql.connect([run], outputs=()) as connection:
        create_judged(connection, [reward.weight for reward in run.config.score.rewards])
        if config.sql is not None:
            text = sql.user_text(run, "advantage.sql", config.sql)
            _check_columns(sql.user_columns(connection, "advantage.sql", text), config.sql)
        if config.where is not None:
            sql.user_columns(connection, "advantage.where", _condition(config.where))


def _advantages(run: Run, iteration: int) -> Iterator[pa.Table]:
    """The rows of `advantages` in key order, a block of whole groups at a time: memory stays bounded."""
    config = run.config.advantage
    with sql.connect([run], iteration, ("rollouts", "rewards")) as connection:
        create_judged(connection, _reward_weights(run, iteration).values())
        parameters: dict[str, Any] = {
            "scale": config.scale,
            "epsilon": config.epsilon,
            "drop_zero_variance": config.drop_zero_variance,
            "truncated": config.truncated,
            "batch_deviation": None,
        }
        if config.scale == "batch":
            parameters |= sql.query(connection, sql.own_text("advantage/batch_deviation")).to_pylist()[0]
        blocks = (
            sql.query(
                connection,
                sql.own_text("advantage/advantage"),
                {**parameters, "first_group": first, "last_group": last},
            )
            for first, last in _blocks(connection)
        )
        if config.sql is None and config.where is None:
            yield from blocks
        else:
            yield _selected(run, connection, pa.concat_tables(blocks))


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


def _blocks(connection: Any) -> Iterator[tuple[int, int]]:
    """First and last group of each block of about BLOCK_ROWS rollouts."""
    counted = "select count(*) as rows, coalesce(max(group_id), 0) + 1 as groups from rollouts"
    [size] = sql.query(connection, counted).to_pylist()
    step = max(1, BLOCK_ROWS * size["groups"] // max(size["rows"], 1))
    for first in range(0, size["groups"], step):
        yield first, first + step - 1


def _selected(run: Run, connection: Any, data: pa.Table) -> pa.Table:
    """`data` after the user's own estimator and condition, which see `data` itself as `advantages`."""
    config = run.config.advantage
    sql.register(connection, "_advantages_0", data)
    if config.sql is not None:
        text = sql.user_text(run, "advantage.sql", config.sql)
        data = _replace(data, sql.user_rows(connection, "advantage.sql", text), config.sql)
    if config.where is not None:
        sql.register(connection, "_advantages_0", data)
        data = _drop(data, sql.user_rows(connection, "advantage.where", _condition(config.where)))
    return data


def _condition(where: str) -> str:
    return f"select {_KEY} from samples where ({where})"


def _check_columns(columns: list[str], name: str) -> None:
    missing = [column for column in (*tables.KEY, "advantage") if column not in columns]
    if missing:
        raise UsageError(f"{name}: returns no column {missing[0]}; it must return {_KEY}, advantage")


def _reward_weights(run: Run, iteration: int) -> dict[str, float]:
    weights: dict[str, float] = run.require("rewards", iteration, "grpo score").summary["weights"]
    return weights


def _replace(data: pa.Table, own: pa.Table, name: str) -> pa.Table:
    """`data` with the advantages of the user's query; rows that it leaves out are not kept."""
    _check_columns(own.column_names, name)
    own = own.select([*tables.KEY, "advantage"]).rename_columns([*tables.KEY, "own"])
    if own.group_by(list(tables.KEY)).aggregate([]).num_rows != own.num_rows:
        raise DataError(f"{name}: returns a rollout twice; it must return each ({_KEY}) once")
    keys = {key: pa.int32() for key in tables.KEY}
    try:
        own = own.cast(pa.schema([*keys.items(), ("own", pa.float64())]))
    except pa.ArrowException as error:
        raise DataError(f"{name}: {_KEY} must be integers and advantage a number: {error}") from None
    joined = data.join(own, list(tables.KEY), join_type="left outer").sort_by(
        [(key, "ascending") for key in tables.KEY]
    )
    given = pc.and_(joined["keep"], pc.is_valid(joined["own"]))
    finite = pc.fill_null(pc.is_finite(joined["own"]), True)
    if not pc.all(finite).as_py():
        raise DataError(f"{name}: returns an advantage that is nan or infinite")
    joined = _unkept(joined, pc.and_(joined["keep"], pc.is_null(joined["own"])))
    advantage = pc.if_else(given, joined["own"], None)
    index = joined.schema.get_field_index("advantage")
    return joined.set_column(index, "advantage", advantage).select(data.column_names)


def _drop(data: pa.Table, wanted: pa.Table) -> pa.Table:
    """`data` with `keep` only where the key is among `wanted`."""
    marked = wanted.append_column("wanted", pa.array([True] * len(wanted), pa.bool_()))
    joined = data.join(marked, list(tables.KEY), join_type="left outer").sort_by(
        [(key, "ascending") for key in tables.KEY]
    )
    return _unkept(joined, pc.and_(joined["keep"], pc.is_null(joined["wanted"]))).select(data.column_names)


def _unkept(data: pa.Table, dropped: pa.ChunkedArray) -> pa.Table:
    """`data` with the rows marked true in `dropped` not kept, reason `filtered`."""
    columns = {
        "advantage": pc.if_else(dropped, None, data["advantage"]),
        "keep": pc.and_(data["keep"], pc.invert(dropped)),
        "reason": pc.if_else(dropped, "filtered", data["reason"]),
    }
    for name, column in columns.items():
        data = data.set_column(data.schema.get_field_index(name), name, column)
    return data
