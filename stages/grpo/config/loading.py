"""config.loading: text -> Config, with errors that name the place and the way out."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from grpo.config import moving, wording
from grpo.config.depth import check_depth
from grpo.config.model import Config
from grpo.config.named_files import read_text
from grpo.config.objectives import OBJECTIVES
from grpo.config.score import secret_of
from grpo.config.yaml import MAX_DEPTH, YamlError, parse
from grpo.errors import UsageError

PIPELINE = "pipeline.yaml"
_CREDENTIALS = re.compile(r'(://)[^/@\s]*(@)|([?&]\w+=)[^\s"]+')  # of an address; no message may hold them


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """pipeline.yaml with `--set key=value` overrides, applied in order. Raises UsageError (exit 2)."""
    try:
        data = parse(read_text(path, str(path), _advice(path)))
    except YamlError as error:
        raise UsageError(f"{path}{error.place}: {error}") from None
    config = validated({} if data is None else data, path, overrides)
    for place, reward in enumerate(config.score.rewards):  # here alone: a run that is there stays readable
        if secret := secret_of(reward):
            raise UsageError(
                f"{path}: score.rewards[{place}].{secret}: looks like a key or a password, and would stand in"
                ' run.json, manifests and reports; let the function read os.environ["NAME"], give the'
                " judge `api_key_env: NAME`, and set NAME in the environment"
            )
    return config


def _advice(path: Path) -> str:
    """How to come to a configuration where there is none at `path`."""
    if path.name == PIPELINE:
        return "; `grpo init` makes a project here, -c FILE names a configuration elsewhere"
    return "; give a configuration with -c FILE"


def validated(data: Any, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `data`, the content of `path`, is with `overrides`. UsageError (exit 2)."""
    for override in overrides:
        data = _override(data, override)
    try:
        check_depth(data, MAX_DEPTH)  # of a mapping from Python; files and overrides have been looked at
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UsageError(_explain(error, path, overrides)) from None


SECTION = "{...}"
"""What stands for the keys of a section, where that is null elsewhere."""
_SHOWN = 80  # characters of a section


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists of mappings count as `rewards[0]`."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and value and all(isinstance(child, dict) for child in value):
        items = [(f"{prefix}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for path, child in items for key, leaf in flatten(child, path).items()}


def differing_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """One text for each key whose value differs: `key: old -> new`, `key: added` or `key: removed`."""
    texts = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            texts += differing_keys(old, new, f"{prefix}{key}.")
        elif key not in before or key not in after:
            texts.append(f"{prefix}{key}: {'added' if key in after else 'removed'}")
        elif old != new:
            texts.append(f"{prefix}{key}: {_short(old)} -> {_short(new)}")
    return texts


def _short(value: Any) -> str:
    """A value as JSON; of a section that is not there on the other side no more than fits on a line."""
    text = json.dumps(value)
    return SECTION if isinstance(value, dict) and len(text) > _SHOWN else text


def overridden_keys(config: Config) -> list[str]:
    """One text for each key whose value is not what the objective sets."""
    objective = config.update.objective
    values, usual = flatten(config.model_dump()), flatten(OBJECTIVES[objective])
    return [
        f"{key}: {json.dumps(values[key])} (objective {objective}: {json.dumps(usual[key])})"
        for key in usual
        if values[key] != usual[key]
    ]


_KEY = re.compile(r"[^.\[\]]+(\[[^.\[\]]+\])*(\.[^.\[\]]+(\[[^.\[\]]+\])*)*")
"""`score.rewards[0].weight`: names, with the places of items of a list in brackets."""


def _override(data: Any, override: str) -> Any:
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key.strip()) or not text.strip():
        raise UsageError(f"--set {override}: expected key=value, such as --set update.learning_rate=1e-6")
    try:
        if len(parts := _parts(key)) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        return _replaced(data, parts, parse(f"value: {text}")["value"])
    except (YamlError, ValueError) as error:
        raise UsageError(f"--set {override}: {error}") from None


def _parts(key: str) -> list[str]:
    """`score.rewards[0].weight` as its steps."""
    return key.strip().replace("[", ".").replace("]", "").split(".")


def _replaced(data: Any, parts: Sequence[str], value: Any) -> Any:
    """`data` with `value` at the place that `parts` lead to; sections missing on the way are made."""
    if not parts:
        return value
    first, *rest = parts
    if not isinstance(data, list):
        section = data if isinstance(data, dict) else {}
        return section | {first: _replaced(section.get(first), rest, value)}
    if first not in map(str, range(len(data))):
        raise ValueError(f"item {first} of a list of {len(data)}; the first is 0")
    return [_replaced(item, rest, value) if str(n) == first else item for n, item in enumerate(data)]


_TYPE_TRIED = re.compile(r"(constrained-)?(int|float|str|bool|list|dict)(\[.*)?|(literal|function-\w+)\[.*")
_FORMER_NAMES = {"resample": "dynamic_sampling", "until_groups_with_signal": "min_groups"}


def _explain(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    """The first problem as `where: section.key: what is wrong`, and how many more there are."""
    by_place: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        by_place.setdefault(_place(problem), []).append(problem)  # of several types, one each
    # An unknown key comes first: that it is not the known one is why that is missing.
    place, problems = min(by_place.items(), key=lambda item: item[1][0]["type"] != "extra_forbidden")
    first = problems[0]
    if first["type"] == "extra_forbidden":
        known, name = _keys_at(place[:-1]), str(place[-1])
        name = _FORMER_NAMES.get(name, name)
        hint = moving.answer(name, first["input"], known, all_keys())
        text = f"unknown key; {hint or 'known keys: ' + ', '.join(known)}"
    elif first["type"] == "missing":
        text = "is required and missing"
    else:
        rights = list(filter(None, map(wording.expected, problems)))
        text = f"expected {' or '.join(rights)}" if rights else first["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:]
        found = wording.found(first)
        if not isinstance(found, dict | list) or first["type"] == "model_type":
            shown = json.dumps(found, default=str)
            text += ", found " + _CREDENTIALS.sub(r"\1\3***\2", shown)
        if hint := moving.answer_value(".".join(str(part) for part in place), first["input"]):
            text += f"; write {hint}"
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    more = f" (and {len(by_place) - 1} more)" if len(by_place) > 1 else ""
    return f"{_where(place, path, overrides)}{key}{': ' if key else ''}{text}{more}"


def _place(problem: Any) -> tuple[int | str, ...]:
    """Where a problem is: behind a key that takes several types pydantic names the type that was tried."""
    place: tuple[int | str, ...] = problem["loc"]
    return place[:-1] if len(place) > 1 and _TYPE_TRIED.fullmatch(str(place[-1])) else place


def _where(location: tuple[int | str, ...], path: Path, overrides: Sequence[str]) -> str:
    """Who gave the value at a place: `--set` that or a section it is in, the file, or both a part each."""
    place = [str(part) for part in location]
    parts = [_parts(override.partition("=")[0]) for override in overrides]
    if any(place[: len(part)] == part for part in parts):
        return "--set "
    return f"{path} with --set: " if any(part[: len(place)] == place for part in parts) else f"{path}: "


def all_keys(model: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration with its sections: `generate.top_p`, `score.rewards[].weight`."""
    keys = []
    for name, field in model.model_fields.items():
        section, many = _section_of(field.annotation)
        keys.append(f"{prefix}{name}")
        if section is not None:
            keys += all_keys(section, f"{prefix}{name}{'[]' if many else ''}.")
    return keys


def _section_of(annotation: Any) -> tuple[Any, bool]:
    """The section that a field holds, or None; and whether it holds a list of them."""
    for part in (annotation, *get_args(annotation)):
        if hasattr(part, "model_fields"):
            return part, get_origin(annotation) is list
    return None, False


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the keys known at a place of the configuration."""
    model: Any = Config
    for part in location:
        if isinstance(part, str):
            model = model.model_fields[part].annotation
            while not hasattr(model, "model_fields"):  # a section that may be null, or a list of sections
                model = get_args(model)[0]
    return list(model.model_fields)
