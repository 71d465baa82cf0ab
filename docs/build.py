"""Write docs/configuration.md, docs/tables.md and the tables of docs/from-*.md from the code. A test checks that they are up to date.

Run: python docs/build.py
"""

import json
import re
import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grpo.config import Config, moving
from grpo.config.objectives import OBJECTIVES
from grpo.sql import own_text
from grpo.tables import RENDERED, TABLES, WITH_OWN_COLUMNS

HERE = Path(__file__).parent
MARK = "<!-- From here on written by docs/build.py from stages/grpo/config/moving"


def configuration() -> str:
    """Every key of pipeline.yaml: type, default, meaning."""
    lines = [
        "# Configuration",
        "",
        "Every key of `pipeline.yaml`. Written by `docs/build.py` from the code; do not edit.",
        "",
        "A key left out has its default. An unknown key, a wrong type or a value out of range ends the command",
        "with exit code 2 and the place. `--set key=value` overrides a key: `--set update.learning_rate=1e-6`,",
        "`--set score.rewards[0].weight=0.5`; a list replaces the whole list. `grpo run --dry-run` shows every",
        "resolved value. Paths are relative to the configuration's folder.",
        "",
        "The file is YAML 1.2: `true` and `false` alone are truth values (`yes`, `no`, `on`, `off` are words, `0777` is",
        "777), `1e-6` is a number, a date is text, and `${...}` is text too. Keys are text, and tabs belong into quotes.",
    ]
    lines += ["", "## Top level", "", *_table(Config, "", sections=False)]
    for name, field in Config.model_fields.items():
        if section := _model(field):
            lines += ["", f"## {name}", "", str(section.__doc__).split("\n")[0], "", *_table(section, name)]
    lines += ["", "## What an objective sets", "", *_objectives(), ""]
    return "\n".join(lines)


def tables() -> str:
    """Every column of every table, and of the view `iterations`."""
    lines = [
        "# Tables",
        "",
        "Every column of every table. Written by `docs/build.py` from the code; do not edit.",
        "",
        "The key of the tables of rollouts is (`iteration`, `group_id`, `sample_id`). `grpo sql` shows each table",
        "over all iterations with a column `run` before the others, and these views more:",
        "",
        "- `iterations`: one row per iteration: [every number](#iterations) that the other commands show of it.",
        "- `samples`: one row per rollout: its scalars, `answer`, `rewards` as map(name, value), the columns of",
        "  `advantages`, and `mismatch`.",
        "- `eval_samples`: one row per rollout of an evaluation: its scalars, `answer` (where `eval_prompts` are still",
        "  those it was made with), `rewards`, their weighted sum `reward`, and whether it `passed`.",
        "- `evals`: one row per policy measured: `prompts`, `samples`, `unscored` (responses without the reward that",
        "  says whether they pass), `pass_reward` (which that is), `pass_threshold`, `pass_at`, `pass_at_low`, `pass_at_high` (maps from k, such as `pass_at[1]`), `reward`,",
        "  `reward_low`, `reward_high`, `rewards` as map(name, mean of the prompts' means), `response_tokens` and `truncated`",
        "  ([evaluation.md](evaluation.md)).",
        "- `scored`, in `advantage.sql` alone: one row per rollout of the iteration: the key, `reward` (the weighted sum of its",
        "  rewards; null where one failed or none applies), `magnitude` (the sum of their sizes, by which equal up to rounding",
        "  is measured), `scored` (whether it counts in its group), `tokens`, `empty` (no response token), `truncated` (cut off",
        "  at max_new_tokens); of its group `group_size`, `group_mean`, `group_std`, `constant` (rewards equal up to rounding);",
        "  and `compared` (scored, in a group of two at least).",
        "- `timings`: `seconds` by `iteration`, `stage` and `part`; of the whole output `started` (its first attempt) and",
        "  `ended` (its commit), in Unix seconds ([what it costs](scaling.md#what-it-costs)).",
        "- `manifests`: one row per committed output, with what it read and the configuration it was made with.",
        "",
        "[Querying](querying.md) has the formats of `grpo sql`, and how to open the files in DuckDB, pandas, polars or pyarrow.",
    ]
    lines += [
        "",
        "## iterations",
        "",
        "A view. A mean over the steps is over the optimiser steps taken, each weighted by",
    ]
    lines += [
        "its response tokens; a number whose table is not there yet is null.",
        "",
        "| column | meaning |",
        "|---|---|",
    ]
    lines += [f"| `{column}` | {_cell(text)} |" for column, text in iterations().items()]
    for name, columns in TABLES.items():
        lines += ["", f"## {name}", "", "| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{column}` | `{kind}` | {_cell(text)} |" for column, (kind, text) in columns.items()]
        if name in WITH_OWN_COLUMNS:
            lines.append("| any other | as in the source | the data set's own columns, untouched |")
            meaning = "only where there are messages: their text as the model sees it"
            lines.append(f"| `{RENDERED}` | `string` | {meaning} |")
    return "\n".join([*lines, ""])


def from_trainer(trainer: str) -> str:
    """The page about moving from a trainer: what is written above the mark, and every name there."""
    prose = (HERE / f"from-{trainer.lower()}.md").read_text().partition(MARK)[0]
    groups = moving.table(trainer)
    lines = [f"{MARK}; do not edit. -->", "", *_counts(trainer, groups)]
    for title, rows in groups.items():
        lines += ["", f"### {title}", "", f"| {trainer} | here |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(text)} |" for name, text in rows.items()]
    return "\n".join([f"{prose}{lines[0]}", *lines[1:], ""])


def _counts(trainer: str, groups: dict[str, dict[str, str]]) -> list[str]:
    texts = [text for rows in groups.values() for text in rows.values()]
    beginnings = ("always", "not needed", "not yet", "no:")
    counts = {start: sum(text.startswith(start) for text in texts) for start in beginnings}
    return [
        f"Of {len(texts)} names {len(texts) - sum(counts.values())} have a key or a command here, {counts['always']} are always so,",
        f"{counts['not needed']} are not needed, {counts['not yet']} are not there yet, and {counts['no:']} are left out, which the row explains.",
    ]


def iterations() -> dict[str, str]:
    """Columns of the view `iterations` -> the sentence above each in its query."""
    final = own_text("sql/views/iterations").partition("final as (")[2].partition("    from present")[0]
    columns = re.findall(r"((?: {8}-- .*\n)+)((?: {8,}[^-\s].*\n)+)", final)
    return {
        re.split(r"[.\s]", query.strip(" ,\n"))[-1]: " ".join(text.replace("-- ", "").split())
        for text, query in columns
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(model: type[BaseModel], prefix: str, sections: bool = True) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        inner = _model(field)
        key = f"{prefix}.{name}" if prefix else name
        if inner is not None and not sections and field.default is not None:
            continue
        if inner is None or field.default is None:  # a section that may be null is a key of its own too
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            rows.append(f"| `{key}` | {_type(field)} | {_default(field)} | {meaning} |")
        if inner is not None and sections:
            many = get_origin(field.annotation) is list
            rows += _table(inner, f"{key}[]" if many else key)[2:]
    return rows


def _model(field: FieldInfo) -> type[BaseModel] | None:
    """The section a field holds, or lists."""
    candidates = [field.annotation, *get_args(field.annotation)]
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return found[0] if found else None


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {value}"
        for item in field.metadata
        for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le"))
        if (value := getattr(item, name, None)) is not None
    ]
    text = _type_name(field.annotation)
    return f"{text} {' and '.join(bounds)}".strip()


def _type_name(annotation: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    origin = get_origin(annotation)
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(get_args(annotation)[0])
    return {list: "list", dict: "mapping"}.get(origin, str(annotation))


def _default(field: FieldInfo) -> str:
    return "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"


def _objectives() -> list[str]:
    keys = [(section, key) for section, values in OBJECTIVES["grpo"].items() for key in values]
    rows = [
        "| key | " + " | ".join(f"`{name}`" for name in OBJECTIVES) + " |",
        "|---|" + "---|" * len(OBJECTIVES),
    ]
    for section, key in keys:
        values = [f"`{json.dumps(settings[section][key])}`" for settings in OBJECTIVES.values()]
        rows.append(f"| `{section}.{key}` | {' | '.join(values)} |")
    return rows


if __name__ == "__main__":
    (HERE / "configuration.md").write_text(configuration())
    (HERE / "tables.md").write_text(tables())
    for trainer in moving.TRAINERS:
        (HERE / f"from-{trainer.lower()}.md").write_text(from_trainer(trainer))
