"""selection: which prompts the groups of an iteration are drawn from, round by round.

By the seeded passes of prompts.draw, or by the user's query over all earlier iterations. Further rounds, and
what a query leaves open, go to the prompts that this iteration has drawn least, in a seeded permutation.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.config.named_files import named_text
from grpo.errors import DataError, UsageError
from grpo.generate.plan import KEY, past_of
from grpo.prompts.table import draw

_PAST = ("rollouts", "rewards", "advantages")


def select(
    run: ActiveRun, iteration: int, rounds: int, prompts: pa.Table, user_sql: sql.UserSql
) -> tuple[np.ndarray, int | None]:
    """Rows of the prompts table by group_id, int64, of all `rounds`, and how many of them the query gave.

    None: there is no query. Raises what the query's result deserves, naming KEY.
    """
    config, seed = run.config.generate, run.config.seed
    count, size = config.prompts_per_iteration, len(prompts)
    if config.prompts_sql is None:
        queue = draw(size, seed, iteration, count)
    else:
        queue = _asked_for(run, iteration, config.prompts_sql, prompts["prompt_id"], user_sql)
    drawn = np.zeros(0, dtype=np.int64)
    for number in range(rounds):
        chosen = queue[number * count : (number + 1) * count]
        drawn = np.concatenate([drawn, chosen])
        if rest := count - len(chosen):
            drawn = np.concatenate([drawn, least_drawn(size, drawn, rest, [seed, iteration, number])])
    return drawn, None if config.prompts_sql is None else min(len(queue), rounds * count)


def least_drawn(num_prompts: int, drawn: np.ndarray, count: int, seed: list[int]) -> np.ndarray:
    """`count` rows of the prompts table: those that `drawn` holds least often, else by a permutation."""
    order = np.random.default_rng(seed).permutation(num_prompts)
    times = np.bincount(drawn, minlength=num_prompts)
    order = order[np.argsort(times[order], kind="stable")]
    rows: np.ndarray = np.resize(order, count)  # from the start again where there are fewer prompts
    return rows


def _asked_for(
    run: ActiveRun, iteration: int, name: str, prompt_ids: pa.ChunkedArray, user_sql: sql.UserSql
) -> np.ndarray:
    """Rows of the prompts table that the query asks for, in its order; prompt_ids: of that table.

    Raises UsageError (exit 2) for a query that cannot be run, DataError (exit 3) for ids that cannot be used.
    """
    past = past_of(run.config.generate, iteration)
    for number in past:
        for output in _PAST:
            for file in run.require(output, number, "grpo run").files:
                run.verify(file, run.path_of(file, output, number))
    seed = (run.config.seed, iteration)
    question = replace(_question(run, name, iteration), iteration=past, outputs=_PAST, seed=seed)
    found = user_sql.rows(question, f"{KEY}: {name}", run.config.sql_timeout_s).table()
    _check_columns(name, found.column_names)
    return _rows_of(found["prompt_id"], prompt_ids, f"{KEY}: {name}")


def check(run: ActiveRun) -> None:
    """Raise UsageError (exit 2) for a query that cannot be run, whatever the tables will hold."""
    if (name := run.config.generate.prompts_sql) is not None:
        with sql.UserSql(run.console.stop_requested) as user_sql:
            _check_columns(name, user_sql.columns(_question(run, name, 0), f"{KEY}: {name}"))


def _question(run: ActiveRun, name: str, iteration: int) -> sql.Question:
    """The user's query and its parameters, of tables that are still empty."""
    count = run.config.generate.prompts_per_iteration
    parameters = {"iteration": iteration, "seed": run.config.seed, "prompts_per_iteration": count}
    text = named_text(run.imports, KEY, name)
    return sql.Question(text, [run], outputs=(), repeatable=True, parameters=parameters)


def _check_columns(name: str, columns: list[str]) -> None:
    if "prompt_id" not in columns:
        message = "returns no column prompt_id; it must return those of the next groups"
        raise UsageError(f"{KEY}: {name}: {message}")


def _rows_of(column: pa.ChunkedArray, prompt_ids: pa.ChunkedArray, where: str) -> np.ndarray:
    if not pa.types.is_integer(column.type):
        kind = f"prompt_id is of type {column.type}"
        raise DataError(f"{where}: {kind}; it must be an integer, as in `prompts`")
    row_of = {prompt_id: row for row, prompt_id in enumerate(prompt_ids.to_pylist())}
    rows: dict[int, int] = {}  # in the order of the query
    for prompt_id in column.to_pylist():
        if prompt_id is None:
            raise DataError(f"{where}: returns a prompt_id that is null; leave such rows out")
        if prompt_id not in row_of:
            raise DataError(f"{where}: returns prompt_id {prompt_id}, which is none of `prompts`")
        if prompt_id in rows:
            raise DataError(f"{where}: returns prompt_id {prompt_id} twice; it must return each prompt once")
        rows[prompt_id] = row_of[prompt_id]
    return np.array(list(rows.values()), dtype=np.int64)
