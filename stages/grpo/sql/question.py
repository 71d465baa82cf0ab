"""question: what is asked of the process that a user's SQL works in, and its way there as JSON."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from grpo.artifacts import OUTPUTS, Run, files
from grpo.errors import UsageError


@dataclass(frozen=True)
class Question:
    """A statement of a user's, and what it may read; runs to repeatable as for connect().

    parameters: of which it may use any, or with all_used must use each. weights, unrewarded: of the view
    `scored`, as for create_scored(). seed: of random(). tables: more rows, as register() shows them.
    condition_of: columns and table that the statement is the condition of; text of ours, for it stands beside
    the user's as it is. rows: so many are enough.
    """

    statement: str
    runs: Sequence[Run]
    iteration: int | range | None = None
    outputs: Collection[str] = tuple(OUTPUTS)
    repeatable: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    all_used: bool = False
    weights: Sequence[float] | None = None
    unrewarded: bool = False
    seed: Sequence[int] | None = None
    tables: Mapping[str, pa.Table | pa.dataset.Dataset] = field(default_factory=dict)
    condition_of: tuple[str, str] | None = None
    rows: int | None = None


def to_json(question: Question, folder: Path) -> bytes:
    """The question for from_json(); its tables lie in files below `folder`.

    Raises UsageError (exit 2) for a parameter that JSON has no place for.
    """
    for name, value in question.parameters.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            expected = "expected text, a number, true or false, None, or a list or mapping of these"
            raise UsageError(f"query: parameter {name}: {error}; {expected}") from None
        except RecursionError:
            raise UsageError(f"query: parameter {name}: nested too deeply") from None
    tables, iteration = {}, question.iteration
    for name, data in question.tables.items():
        path = tables[name] = str(folder / f"{name}.arrow")
        with files.resource_errors(Path(path)), pa.ipc.new_file(path, data.schema) as file:
            file.write_table(data)
    values = {each.name: getattr(question, each.name) for each in fields(question)} | {
        "runs": [[str(run.path), run.name] for run in question.runs],
        "iteration": [iteration.start, iteration.stop] if isinstance(iteration, range) else iteration,
        "tables": tables,
    }
    return json.dumps(values).encode()


def from_json(text: bytes) -> Question:
    """The question that to_json() was given, its tables to be read from their files."""
    values = json.loads(text)
    runs = [Run(Path(folder).parent, Path(folder).name) for folder, _ in values["runs"]]
    for run, (_, name) in zip(runs, values["runs"], strict=True):
        run.name = name  # its path, where two folders have one name
    shown = values["iteration"]
    changed = {
        "runs": runs,
        "iteration": range(*shown) if isinstance(shown, list) else shown,
        "tables": {name: pa.dataset.dataset(path, format="ipc") for name, path in values["tables"].items()},
    }
    return Question(**(values | changed))
