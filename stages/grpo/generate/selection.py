"""selection: which prompts the groups of an iteration are drawn from, round by round.

By the seeded passes of prompts.draw, or by the user's query over all earlier iterations. What these leave
open, further rounds and the rest of a query that gives too few, goes to the prompts that this iteration has
drawn least, in a permutation of (seed, iteration, round): nothing depends on what ran before.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.config.named_files import named_text
from grpo.errors import DataError, UsageError
from grpo.generate.plan import KEY
from grpo.prompts.table import draw

_PAST = ("rollouts", "rewards", "advantages")


@dataclass(frozen=True)
class Selection:
    """Rows of the prompts table by group_id, int64; and of these, by the query (null: there is none)."""

    rows: np.ndarray
    by_query: int | None


def select(run: ActiveRun, iteration: int, rounds: int, prompts: pa.Table) -> Selection:
    """The prompts of every round up to `rounds`. Raises what the query's result deserves, naming KEY."""
    config, seed = run.config.generate, run.config.seed
    count, size = config.prompts_per_iteration, len(prompts)
    if config.prompts_sql is None:
        queue = draw(size, seed, iteration, count)
    else:
        queue = asked_for(run, iteration, prompts["prompt_id"].to_numpy())
    drawn = np.zeros(0, dtype=np.int64)
    for number in range(rounds):
        chosen = queue[number * count : (number + 1) * count]
        drawn = np.concatenate([drawn, chosen])
        if rest := count - len(chosen):
            drawn = np.concatenate([drawn, least_drawn(size, drawn, rest, [seed, iteration, number])])
    by_query = None if config.prompts_sql is None else min(len(queue), rounds * count)
    return Selection(drawn, by_query)


def least_drawn(num_prompts: int, drawn: np.ndarray, count: int, seed: list[int]) -> np.ndarray:
    """`count` rows of the prompts table: those that `drawn` holds least often, else by a permutation."""
    order = np.random.default_rng(seed).permutation(num_prompts)
    times = np.bincount(drawn, minlength=num_prompts)
    order = order[np.argsort(times[order], kind="stable")]
    rows: np.ndarray = np.resize(order, count)  # from the start again where there are fewer prompts
    return rows


def asked_for(run: ActiveRun, iteration: int, prompt_ids: np.ndarray) -> np.ndarray:
    """Rows of the prompts table that the query asks for, in its order; prompt_ids: of that table, ascending.

    Raises UsageError (exit 2) for a query that cannot be run, DataError (exit 3) for ids that cannot be used.
    """
    name = str(run.config.generate.prompts_sql)
    text = named_text(run.imports, KEY, name)
    for number in range(iteration):
        for output in _PAST:
            for file in run.require(output, number, "grpo run").files:
                run.verify(file, run.path_of(file, output, number))
    with sql.connect([run], range(iteration), _PAST, repeatable=True) as connection:
        sql.seed_random(connection, run.config.seed, iteration)
        found = sql.user_rows(connection, KEY, text, _parameters(run, iteration))
    _check_columns(name, found.column_names)
    return _rows_of(found["prompt_id"], prompt_ids, f"{KEY}: {name}")


def check(run: ActiveRun) -> None:
    """Raise UsageError (exit 2) for a query that cannot be run, whatever the tables will hold."""
    name = run.config.generate.prompts_sql
    if name is None:
        return
    text = named_text(run.imports, KEY, name)
    with sql.connect([run], outputs=()) as connection:
        _check_columns(name, sql.user_columns(connection, KEY, text, _parameters(run, 0)))


def _parameters(run: ActiveRun, iteration: int) -> dict[str, int]:
    count = run.config.generate.prompts_per_iteration
    return {"iteration": iteration, "seed": run.config.seed, "prompts_per_iteration": count}


def _check_columns(name: str, columns: list[str]) -> None:
    if "prompt_id" not in columns:
        raise UsageError(
            f"{KEY}: {name}: returns no column prompt_id; it must return those of the next groups"
        )


def _rows_of(column: pa.ChunkedArray, prompt_ids: np.ndarray, where: str) -> np.ndarray:
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"{where}: prompt_id is of type {column.type}; it must be an integer, as in `prompts`"
        )
    if column.null_count:
        raise DataError(f"{where}: returns a prompt_id that is null; leave such rows out")
    asked = column.to_numpy()
    places = np.searchsorted(prompt_ids, asked)
    known = prompt_ids[np.minimum(places, len(prompt_ids) - 1)] == asked
    if not known.all():
        raise DataError(f"{where}: returns prompt_id {asked[~known][0]}, which is none of `prompts`")
    values, counts = np.unique(asked, return_counts=True)
    if len(values) < len(asked):
        twice = values[counts > 1][0]
        raise DataError(f"{where}: returns prompt_id {twice} twice; it must return each prompt once")
    rows: np.ndarray = places.astype(np.int64)
    return rows
