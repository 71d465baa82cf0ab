"""moving: what TRL and verl call a key or a value -> what it is here.

docs/from-trl.md and from-verl.md show the tables beside this file; a mistyped key is answered from them.
"""

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from grpo.config.yaml import parse

TRAINERS = ("TRL", "verl")
_NEAR = 0.85  # of a name of theirs; a key of ours may be further off
# Last parts of names with dots that say nothing alone.
_GENERAL = {
    *("device", "enable", "filter", "json", "len", "map", "metric", "mode", "name", "num_workers", "path"),
    *("select", "strategy", "type"),
}


def table(trainer: str) -> dict[str, dict[str, str]]:
    """Title of a group -> name there -> what it is here, in one line with our keys in backquotes."""
    found: dict[str, dict[str, str]] = _read(trainer.lower())
    return found


def answer(name: str, value: Any, here: list[str], keys: list[str]) -> str:
    """What an unknown key may have meant, as the end of a message; empty where nothing is like it.

    here: keys known at its place; keys: every key of the configuration, with dots.
    """
    if name in here:  # what it was called before
        return f"did you mean {name}?"
    names = _names()
    name = name.lstrip("+")  # Hydra's, before a key that it is to add
    exact = next((each for path in _paths(name, value) for each in _within(path) if each in names), None)
    if exact:
        return names[exact]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name][:2]
    own = difflib.get_close_matches(name, here, n=1)
    theirs = difflib.get_close_matches(name, names, n=1, cutoff=_NEAR)
    if theirs and not elsewhere and (not own or _likeness(name, theirs[0]) > _likeness(name, own[0])):
        return names[theirs[0]]
    return f"did you mean {', or '.join([*own, *elsewhere])}?" if own or elsewhere else ""


def answer_value(key: str, value: Any) -> str:
    """What to write for a value of theirs; empty where it is none."""
    text = json.dumps(value, default=str)
    patterns = _read("values").get(key, {})
    fitting = ((re.fullmatch(pattern, text), what) for pattern, what in patterns.items())
    return next((match.expand(what) for match, what in fitting if match), "")


def _names() -> dict[str, str]:
    """Every name of theirs -> the end of a message; of verl's also the last part alone. TRL's come first."""
    found: dict[str, str] = {}
    for trainer in reversed(TRAINERS):
        rows = [row for group in table(trainer).values() for row in group.items()]
        for name, text in reversed(rows):
            says = f"{trainer}'s {name}: {text.replace('`', '')}"
            found[name] = says
            if (last := name.rpartition(".")[2]) not in _GENERAL:
                found[last] = says
    return found


def _paths(name: str, value: Any) -> list[str]:
    """`name`, or what is within it, with dots: verl's `actor_rollout_ref` holds sections."""
    if not isinstance(value, dict) or not value:
        return [name]
    return [f"{name}.{path}" for key, child in value.items() for path in _paths(str(key), child)]


def _within(path: str) -> list[str]:
    """A path and the sections that it is in, the innermost first: a section may have a row of its own."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


@cache
def _read(name: str) -> Any:
    return parse((Path(__file__).parent / f"{name}.yaml").read_text())
