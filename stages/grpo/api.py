"""api: what `import grpo` gives: runs to query, and to work on by the way of the commands.

docs/python.md has it with examples. Errors are those of the commands, as exceptions with their `exit_code`.
"""

import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any

from grpo import sql, tables
from grpo.artifacts import ARTIFACTS, OUTPUTS, TABLES_OF, ActiveRun, Best, best_of, find_run, own_config
from grpo.config import Config, validated
from grpo.console import Console, iterations_text, printable, quieten_libraries
from grpo.errors import UsageError
from grpo.inspect import evaluations, log, outdated
from grpo.inspect.rows import Rows
from grpo.pipeline import work
from grpo.pipeline.opening import configured, working

Settings = Mapping[str, Any]
"""Keys with dots, as `--set` has them, and their values: {"update.learning_rate": 1e-6}."""
Configuration = str | Path | Mapping[str, Any]
"""A pipeline.yaml, or what one holds."""
_SHOWN = 80  # characters of what was found
_VIEWS = ("samples", "iterations", "eval_samples", "evals", "timings", "manifests")
_ORDER = (
    *("run", *tables.KEY, "prompt_id", "name", "update_iteration"),
    *("stage", "output", "attempt", "part"),
)


class Run:
    """A run on disk, as `grpo.open` and `grpo.run` give it. To read it takes no lock and changes nothing."""

    def __init__(self, active: ActiveRun) -> None:
        self.active = active
        self._user_sql = sql.UserSql()
        weakref.finalize(self, self._user_sql.close)

    def __repr__(self) -> str:
        return f"grpo.Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Its name: that of its folder."""
        return self.active.name

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.active.path

    @property
    def config(self) -> Config:
        """The configuration in force, every value resolved."""
        return self.active.config

    @property
    def iterations(self) -> Rows:
        """One row per iteration: every number of docs/tables.md#iterations, as it is on disk now."""
        return self.table("iterations")

    @property
    def samples(self) -> Rows:
        """One row per rollout: scalars, answer, rewards, advantage; as it is on disk now."""
        return self.table("samples")

    @property
    def best(self) -> Best | None:
        """The best of the policies measured, by `stop.metric`; None where none was."""
        return best_of(self.active, self.active.evaluations())

    def sql(
        self,
        query: str,
        parameters: Mapping[str, Any] | None = None,
        beside: Sequence["Run"] = (),
        timeout_s: float = sql.TIMEOUT_S,
    ) -> Rows:
        """The rows of one read-only query (DuckDB); `$name` in it is a parameter.

        beside: other runs whose rows the tables hold too, told apart by the column `run`. Raises UsageError
        with DuckDB's message, ResourceError over a limit, CorruptError for a damaged file.
        """
        _expect("query", query, str, "text")
        _expect(
            "parameters", {} if parameters is None else parameters, Mapping, "a mapping of names to values"
        )
        _expect("beside", beside, list | tuple, "a list of open runs")
        for other in beside:
            _expect("beside", other, Run, "open runs, as grpo.open gives them")
        runs = [self.active, *(other.active for other in beside)]
        question = sql.Question(query, runs, parameters=dict(parameters or {}), all_used=True)
        outdated.say(runs, outputs=outdated.read_by(query))
        return Rows(self._user_sql.rows(question, timeout_s=timeout_s).table())

    def table(self, name: str, iteration: int | None = None) -> Rows:
        """A table or view, of one iteration or of all, in the order of its key.

        Raises UsageError for one that is not known, InputError for an iteration that has none of it.
        """
        known = (*tables.TABLES, *_VIEWS)
        if name not in known:
            raise UsageError(f"table {name}: no such table; there are {', '.join(known)}")
        if iteration is not None:
            self._check_held(name, iteration)
        columns = sql.read([self.active], f"from {name} limit 0").column_names
        order = [column for column in (*_ORDER, "epoch", "step") if column in columns]
        query = f"from {name} order by {', '.join(order)}"
        outdated.say([self.active], None if iteration is None else [iteration], outdated.read_by(name))
        return Rows(sql.read([self.active], query, iteration=iteration))

    def _check_held(self, table: str, iteration: int) -> None:
        """Raise UsageError, InputError for an iteration of which nothing is there, or not this table."""
        have = sorted({*self.active.iterations(), *self.active.evaluations()})
        if not is_count(iteration) or iteration not in have:
            there = iterations_text(have) if have else "no iteration yet"
            raise UsageError(f"iteration {iteration!r}: run {self.name} has {there}")
        output = next((output for output, held in TABLES_OF.items() if table in held), table)
        if output in OUTPUTS:
            self.active.require(output, iteration, f"grpo {OUTPUTS[output]}")


def open(run: str | Path, config: Configuration | None = None, overrides: Settings | None = None) -> Run:
    """A run by its folder, `"artifacts/x"`, or by its name.

    config: the configuration in force, where it is not the one that the run was created with; either with
    `overrides`. Raises UsageError where no run is there, CorruptError where its run.json changed.
    """
    _expect("run", run, str | PathLike, "the folder or the name of a run")
    folder = find_run(str(run))
    if config is not None:
        found = _configured(config, {**(overrides or {}), "run": folder.name}, False)
        return Run(ActiveRun(folder.parent, found.config, found.imports, found.console))
    return Run(ActiveRun(folder.parent, own_config(folder, _texts(overrides)), Path.cwd(), Console()))


def run(
    config: Configuration, until: int | None = None, overrides: Settings | None = None, quiet: bool = False
) -> Run:
    """`grpo run`: every iteration, or the first `until`; complete work is never redone. The run, to look at.

    quiet: no line on stderr. Raises what the command ends with: UsageError, LockedError, EngineError ...
    """
    active = _configured(config, overrides, quiet)
    with _script_unseen():
        train(active, until)
    return Run(active)


def train(active: ActiveRun, until: int | None = None, start: int | None = None, yes: bool = False) -> Any:
    """Complete a run, and say how it came out. start, yes: of `--from`. What `grpo run` and run() both do."""
    if until is not None and not is_count(until):
        raise UsageError(f"--until {until}: expected a number of iterations, 0 or more")
    with working(active):
        until = active.config.iterations if until is None else until
        if start is not None:
            work.restart_from(active, start, yes)
        with log.reporting(active, until) as (iteration, policy):
            worked, ended = work.run(active, until, iteration, policy)
        found = [evaluations.numbers_of(active, policy) for policy in active.evaluations()]
    stopped = None if ended is None else asdict(ended)
    done = {"run": active.name, "iterations": until, "worked": worked}
    return {**done, "evaluations": found, "stopped": stopped}


@contextmanager
def at_work(target: Run | Configuration, overrides: Settings | None, quiet: bool) -> Iterator[ActiveRun]:
    """An open run under its configuration, or the run of a configuration, as working() makes it ready."""
    with _script_unseen(), working(_active_of(target, overrides, quiet)) as active:
        yield active


@contextmanager
def _script_unseen() -> Iterator[None]:
    """Have spawned processes not import the caller's script: without a guard it would run again in each."""
    main = vars(sys.modules["__main__"])
    before = {name: main[name] for name in ("__file__", "__spec__") if main.get(name) is not None}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(before)


def _active_of(target: Run | Configuration, overrides: Settings | None, quiet: bool) -> ActiveRun:
    if not isinstance(target, Run):
        return _configured(target, overrides, quiet)
    held, place = target.active, target.path / "run.json"
    config = validated(held.config.model_dump(), place, _texts(overrides)) if overrides else held.config
    return ActiveRun(held.root, config, held.imports, Console(quiet))


def _configured(config: Configuration, overrides: Settings | None, quiet: bool) -> ActiveRun:
    _expect("config", config, str | PathLike | Mapping, "the name of a pipeline.yaml, or what one holds")
    quieten_libraries()
    if not isinstance(config, Mapping):
        return configured(Path(config), _texts(overrides), quiet)
    values = validated(dict(config), Path("config"), _texts(overrides))
    return ActiveRun(ARTIFACTS, values, Path.cwd(), Console(quiet))


def _texts(overrides: Settings | None) -> list[str]:
    """Overrides as `--set` takes them: JSON is YAML. Raises UsageError for what is no JSON."""
    texts = []
    _expect("overrides", {} if overrides is None else overrides, Mapping, "a mapping of keys to values")
    for key, value in (overrides or {}).items():
        try:
            texts.append(f"{key}={json.dumps(value, allow_nan=False)}")
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"overrides: {key}: {error}; expected text, numbers, lists or mappings"
            ) from None
        except RecursionError:
            raise UsageError(f"overrides: {key}: nested too deeply") from None
    return texts


def is_count(value: Any) -> bool:
    """Whether a value is a whole number, 0 or more; True is none."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    return is_whole and int(value) >= 0


def _expect(name: str, value: object, kind: type | UnionType, expected: str) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{name}: expected {expected}, found {printable(repr(value))[:_SHOWN]}")
