"""call: reward function + one group -> one outcome per rollout: what a worker does with the user's function.

Nothing here imports torch or numpy: their tensors and arrays are read through their own methods.
"""

import ast
import asyncio
import importlib
import inspect
import numbers
import pkgutil
import textwrap
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from grpo.errors import listed
from grpo.score.functions.built_in import BUILT_IN, Text
from grpo.score.outcome import Outcome, one_line, outcome_of

# Keywords that every function may take; the last three are TRL's.
OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class GroupCall(NamedTuple):
    """The rollouts of one group as a reward function sees them; every list has one element per rollout.

    prompts, completions: text, or lists of messages; completion_ids: response token ids;
    columns: every data set column, `answer` included. All must pickle. iteration: that sampled them, from 0.
    """

    prompts: Sequence[Text]
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    columns: dict[str, list[Any]]
    iteration: int = 0

    def alone(self, sample: int) -> "GroupCall":
        """The call for one rollout of the group."""
        one = slice(sample, sample + 1)
        columns = {name: values[one] for name, values in self.columns.items()}
        lists = (self.prompts[one], self.completions[one], self.completion_ids[one])
        return GroupCall(*lists, columns, self.iteration)


class TrainerState:
    """TRL's `trainer_state` as far as it has a meaning on disk: `global_step` is the iteration, from 0.

    Whatever else is asked of it raises AttributeError: a made-up value would be a wrong reward.
    """

    def __init__(self, iteration: int) -> None:
        self.global_step = iteration

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no {name} here, only global_step: the iteration, from 0")


def load(function: str) -> Any:
    """A built-in, or what `package.module:function` names; raises whatever its import raises."""
    return BUILT_IN.get(function) or pkgutil.resolve_name(function)


def find_problem(
    function: str,
    arguments: dict[str, Any],
    file: Path | None,
    columns: Collection[str] | None,
    empty: Collection[str] = (),
) -> str | None:
    """What is wrong with a function and its arguments, as one line; None if nothing is.

    file: where the module must come from (None: a built-in). columns: names of the data set's columns;
    None where they are not known yet, and then required keywords are not checked. empty: those of them
    that have no value in any row.
    """
    if file is not None and (problem := _module_problem(function, file)):
        return problem
    loaded = load(function)
    if inspect.isclass(loaded):
        return f"is a class; write `reward = {loaded.__name__}(...)` below it, and name that"
    try:
        inspect.signature(loaded)
    except ValueError:
        return "does not tell its parameters (compiled code); wrap it in a Python function"
    return (
        _name_problem(loaded, arguments, columns)
        or _keyword_problem(loaded, arguments, columns, empty)
        or _argument_problem(function, arguments)
    )


def run(function: Callable[..., Any], arguments: dict[str, Any], group: GroupCall) -> list[Outcome]:
    """Call the function on one group. Raises what it raises; an unusable result is an error of each."""
    offered = {
        **group.columns,
        "prompts": group.prompts,
        "completions": group.completions,
        "completion_ids": group.completion_ids,
        "trainer_state": TrainerState(group.iteration),
        "log_extra": log_extra,
        "log_metric": log_metric,
        **arguments,
    }
    num_rollouts = len(group.completions)  # before the call: the function may change its arguments
    accepted, takes_all = _keywords(function)
    result = function(**{name: value for name, value in offered.items() if takes_all or name in accepted})
    if inspect.isawaitable(result):
        result = _event_loop().run(_wait_for(result))
    try:
        return [_outcome(value) for value in _values(result, num_rollouts)]
    except (TypeError, ValueError) as error:
        # Not raised: one by one the same function may seem to fit, with values that belong to nobody.
        return [Outcome(None, "error", one_line(str(error)))] * num_rollouts


def describe(error: BaseException) -> str:
    """One line with the type and message of an exception, and the line of code that raised it."""
    if isinstance(error, SyntaxError):  # has file and line; what traceback makes of it is four lines
        return one_line(f"SyntaxError: {error}")
    text = " ".join(traceback.format_exception_only(error))
    frames = traceback.extract_tb(error.__traceback__)
    if frames and not isinstance(error, ImportError):
        text += f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return one_line(text)


async def _wait_for(result: Any) -> Any:
    return await result


@cache
def _event_loop() -> asyncio.Runner:
    """One for the life of the process: what a module keeps open belongs to the loop of its first use."""
    return asyncio.Runner()


def log_extra(column: str, values: list[Any]) -> None:
    """As TRL passes it; what a function reports besides its rewards is not kept."""


def log_metric(name: str, value: float) -> None:
    """The same of a number."""


def _module_problem(function: str, file: Path) -> str | None:
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - whatever the user's module raises is the answer
        return f"importing {module_name} failed: {describe(error)}"
    found = getattr(module, "__file__", None)
    if found is None or not file.samefile(found):
        return f"{module_name} is also the name of {found or 'a part of Python'}; rename {file.name}"
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module_name]
        return f"no {name!r} in {module_name}; it has: {listed(own, name) or 'no functions'}"
    if not callable(getattr(module, name)):
        return f"{name} is not callable, it is {_kind(getattr(module, name))}"
    return None


def _keywords(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The keyword parameters of a function, and whether it takes any keyword (**kwargs)."""
    parameters = inspect.signature(function).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    accepted = {p.name: p for p in parameters if p.kind in by_name}
    return accepted, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _name_problem(
    function: Callable[..., Any], arguments: dict[str, Any], columns: Collection[str] | None
) -> str | None:
    """Of the names in `arguments`: each is one that the function reads, and none that something else has."""
    accepted, takes_all = _keywords(function)
    own = function in BUILT_IN.values()
    read = _read_of_kwargs(function) if takes_all and not own else set()
    for name in arguments:
        if name in OURS:
            return f"arguments.{name}: this keyword is passed to every function; choose another name"
        if name in (columns or ()):
            return f"arguments.{name}: the data has a column of this name, which is passed too; rename one"
        if name not in accepted and read is not None and name not in read:
            takes = (
                sorted({*accepted, *read} - {*OURS, *(columns or ())}) if own else [*accepted, *sorted(read)]
            )
            why = (
                "; what it does not look up in its **kwargs changes nothing" if takes_all and not own else ""
            )
            return f"arguments.{name}: the function takes no such keyword, but: {', '.join(takes)}{why}"
    return None


def _read_of_kwargs(function: Callable[..., Any]) -> set[str] | None:
    """The names that a function looks up in its `**kwargs`; None where its source does not tell."""
    parameters = inspect.signature(function).parameters.values()
    [kwargs] = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return None
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, SyntaxError):
        return None
    used = [node.id for node in nodes if isinstance(node, ast.Name)]
    names = []
    for node in nodes:
        match node:
            case (
                ast.Subscript(value=ast.Name(id=found), slice=ast.Constant(value=str(name)))
                | ast.Call(
                    func=ast.Attribute(value=ast.Name(id=found), attr="get" | "pop"),
                    args=[ast.Constant(value=str(name)), *_],
                )
                | ast.Compare(left=ast.Constant(value=str(name)), comparators=[ast.Name(id=found)])
            ) if found == kwargs:
                names.append(name)
    whole = used.count(kwargs) > len(names) or {"locals", "vars", "eval", "exec"} & {*used}
    return None if whole else set(names)


def _keyword_problem(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    columns: Collection[str] | None,
    empty: Collection[str],
) -> str | None:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            return f"{parameter.name!r} is positional-only; everything is passed by keyword"
    accepted, _ = _keywords(function)
    required = [name for name, p in accepted.items() if p.default is p.empty and name not in arguments]
    missing = [name for name in required if name not in {*OURS, *(columns or ())}]
    if columns is None:
        return None
    if "environments" in missing:
        return "needs environments, which TRL has for tools; there are no tools here, so it cannot be used"
    if missing:
        there = listed(columns, missing[0])
        return f"needs {', '.join(missing)}: not in arguments, and no column; the columns are: {there}"
    for name in required:
        if name in empty:
            return f"needs {name}, {no_values(name)}"
    return None


def no_values(column: str) -> str:
    """What is said of a column that is asked for and has no value in any row."""
    return f"and no row of the prompts has a value there; `prompts.columns.{column}: NAME` says where it is"


def _argument_problem(function: str, arguments: dict[str, Any]) -> str | None:
    """Built-in functions check their arguments when called, so call one on no rollouts."""
    if function not in BUILT_IN:
        return None
    try:
        run(BUILT_IN[function], arguments, GroupCall([], [], [], {"answer": []}))  # the one column they read
    except ImportError as error:  # of a built-in that stands on an optional package
        return str(error)
    except (TypeError, ValueError) as error:
        return f"arguments: {error}"
    return None


def _values(result: Any, num_rollouts: int) -> list[Any]:
    if not isinstance(result, list | tuple):
        if not hasattr(result, "tolist") or getattr(result, "ndim", None) != 1:
            factory = "; does it make reward functions? call it in a file of yours, and name what it returns"
            hint = factory if callable(result) else ""
            raise TypeError(f"returned {_kind(result)}, not a list of {num_rollouts} numbers{hint}")
        result = result.tolist()
    if len(result) != num_rollouts:
        raise ValueError(f"returned {len(result)} values for {num_rollouts} rollouts")
    return list(result)


def _outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome(None, "not_applicable")
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy scalar, 0-d array or tensor
        value = value.item()
    if not isinstance(value, numbers.Real):
        return Outcome(None, "error", one_line(f"returned {_kind(value)}, not a number"))
    try:
        return outcome_of(float(value), "returned")
    except OverflowError:
        return Outcome(None, "nonfinite", "returned a number too large for a float")


def _kind(value: Any) -> str:
    name = type(value).__name__
    if getattr(value, "shape", None) is not None:
        return f"{name} of shape {tuple(value.shape)}"
    return f"{name} {str(value)[:60]!r}" if isinstance(value, str | int | float | dict) else name
