"""config.loading: text -> Config, with errors that name the place and the way out."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from grpo.config.model import Config
from grpo.config.update import OBJECTIVES
from grpo.errors import UsageError

_CREDENTIALS = re.compile("://[^/@\\s]*@")  # of an address; no message may hold them
_LINE_BREAK = re.compile("[\n\x85\u2028\u2029]")  # those of YAML; reading made one of \r and \r\n


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read pipeline.yaml and apply `--set key=value` overrides in order.

    Raises UsageError (exit 2), one line: file, place, what was found, what would be right.
    """
    return validated(_read(path), path, overrides)


def validated(data: Any, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `data`, the content of `path`, is with `overrides`; errors as load()'s."""
    for override in overrides:
        data = _override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UsageError(_explain(error, path, overrides)) from None


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
        path = f"{prefix}{key}"
        old, new = before.get(key), after.get(key)
        if key not in before:
            texts.append(f"{path}: added")
        elif key not in after:
            texts.append(f"{path}: removed")
        elif isinstance(old, dict) and isinstance(new, dict):
            texts += differing_keys(old, new, f"{path}.")
        elif old != new:
            texts.append(f"{path}: {json.dumps(old)} -> {json.dumps(new)}")
    return texts


def overridden_keys(config: Config) -> list[str]:
    """One text for each key whose value is not what the objective sets."""
    objective = config.update.objective
    values, usual = flatten(config.model_dump()), flatten(OBJECTIVES[objective])
    return [
        f"{key}: {json.dumps(values[key])} (objective {objective}: {json.dumps(usual[key])})"
        for key in usual
        if values[key] != usual[key]
    ]


def _read(path: Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml.error import MarkedYAMLError
    from yaml.reader import ReaderError

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give a configuration with -c FILE") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        column = error.start - (error.object.rfind(b"\n", 0, error.start) + 1) + 1
        raise UsageError(f"{path}:{line}:{column}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    lines = _LINE_BREAK.split(text)
    for number, line_text in enumerate(lines, start=1):
        if "${" in line_text:
            place = f"{path}:{number}:{line_text.index('${') + 1}"
            raise UsageError(f"{place}: ${{...}} is not supported; write the value itself")
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        at_tab = mark and lines[mark.line][mark.column : mark.column + 1] == "\t"
        hint = "; use spaces, not tabs" if at_tab else ""
        raise UsageError(f"{path}{place}: {_first_sentence(_problem(error))}{hint}") from None
    except ReaderError as error:
        before = text[: error.position]
        place = f"{path}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise UsageError(f"{place}: control character U+{error.character:04X} in the text") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except AssertionError:  # OmegaConf's own, of a text that is a number
        raise UsageError(f"{path}: expected sections with keys, found a single value") from None
    except (OmegaConfBaseException, ValueError) as error:  # of a tag or a key that is no text or number
        raise UsageError(f"{path}: {_first_sentence(str(error))}") from None


def _problem(error: Any) -> str:
    """What a YAML parser found; newer ones count how deep a text is nested before Python does."""
    return "nested too deeply" if "nesting depth" in str(error.problem) else str(error.problem)


def _first_sentence(text: str) -> str:
    """Of a library's message; the advice behind it is for programmers."""
    return re.split("[.;] ", text.splitlines()[0])[0].rstrip(".")


def _override(data: Any, override: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError
    from yaml.error import MarkedYAMLError

    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise UsageError(f"--set {override}: expected key=value, such as --set update.learning_rate=1e-6")
    if "${" in text:
        raise UsageError(f"--set {override}: ${{...}} is not supported; write the value itself")
    try:
        value = OmegaConf.create(f"value: {text}").value
        config = OmegaConf.create(data)
        OmegaConf.update(config, key.strip(), value, merge=False)
        return OmegaConf.to_container(config, resolve=False)
    except RecursionError:
        raise UsageError(f"--set {override}: nested too deeply") from None
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        text = _problem(error) if isinstance(error, MarkedYAMLError) else str(error)
        raise UsageError(f"--set {override}: {_first_sentence(text)}") from None


_RENAMED = {"dynamic_sampling": "dynamic_sampling", "min_groups": "min_groups"}


def _explain(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    """The first problem as `where: section.key: what is wrong`, and how many more there are.

    An unknown key comes first: that it is not the known one is why that is missing.
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    location = list(first["loc"])
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        name = str(location[-1])
        near = difflib.get_close_matches(_RENAMED.get(name, name), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        text = f"unknown key; {hint}"
    elif first["type"] == "model_type":
        text = f"expected a section with keys, found {json.dumps(first['input'], default=str)}"
    elif first["type"] == "missing":
        text = "is required and missing"
    else:
        text = first["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:]
        if not isinstance(first["input"], dict | list):
            found = json.dumps(first["input"], default=str)
            text += f", found {_CREDENTIALS.sub('://***@', found)}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    where = _where(location, path, overrides)
    return f"{where}{key}: {text}{more}" if key else f"{where}{text}{more}"


def _where(location: list[int | str], path: Path, overrides: Sequence[str]) -> str:
    """Who gave the value at a place: `--set` that or a section it is in, the file, or both a part each."""
    place = [str(part) for part in location]
    keys = [override.partition("=")[0].strip() for override in overrides]
    parts = [key.replace("[", ".").replace("]", "").split(".") for key in keys]
    if any(place[: len(part)] == part for part in parts):
        return "--set "
    return f"{path} with --set: " if any(part[: len(place)] == place for part in parts) else f"{path}: "


def _fields_at(location: list[int | str]) -> list[str]:
    """Names of the keys known at a place of the configuration."""
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        model = _model_of(TypeAdapter(annotation).core_schema)
    return list(model.model_fields)


def _model_of(schema: Any) -> type[BaseModel]:
    """The pydantic model inside a core schema: of the field itself, or of a list's items."""
    while schema["type"] != "model":
        schema = schema.get("items_schema") or schema["schema"]
    found: type[BaseModel] = schema["cls"]
    return found
