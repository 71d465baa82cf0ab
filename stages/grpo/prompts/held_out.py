"""held_out: how the prompts of an evaluation compare with those of training: a line for what spoils it."""

import json
from collections.abc import Iterable

from grpo.config import Config
from grpo.prompts.source import Row

_RENDERING = ("chat_template", "chat_template_arguments")


def same_source(config: Config) -> str:
    """A line where both sections name the same data, which need not be read to see it; else nothing."""
    held_out = config.evaluate.prompts if config.evaluate else None
    keys = ("source", "subset", "split", "revision")
    if held_out is None or any(getattr(held_out, key) != getattr(config.prompts, key) for key in keys):
        return ""
    return f"evaluate.prompts: {held_out.source} ({held_out.split}) is what `prompts` are: not held out"


def compare(config: Config, drawn: Iterable[Row], held_out: list[Row]) -> list[str]:
    """Lines on `held_out` rows against those that training draws; rows as `prompts` has them."""
    assert config.evaluate is not None, "there are no held-out prompts without `evaluate`"
    asked, systems, chats = set[str](), set[str | None](), set[bool]()
    for row in drawn:
        asked.add(_asked(row))
        systems.add(_system(row))
        chats.add(row["messages"] is not None)
    count, lines = len(held_out), []
    if shared := sum(_asked(row) in asked for row in held_out):
        lines.append(f"{shared} of {count} are among `prompts`: not held out")
    if other := sum((row["messages"] is not None) not in chats for row in held_out):
        kind = "text, and `prompts` are chats" if True in chats else "chats, and `prompts` are text"
        lines.append(f"{other} of {count} are {kind}: the model is measured on another form")
    elif other := sum(_differs(_system(row), systems) for row in held_out):
        lines.append(f"{other} of {count} have no system message, or another one than `prompts` have")
    for key in _RENDERING if True in chats else ():
        if getattr(config.evaluate.prompts, key) != getattr(config.prompts, key):
            lines.append(f"{key} is not that of `prompts`")
    return [f"evaluate.prompts: {line}" for line in lines]


def _asked(row: Row) -> str:
    """A prompt without system messages, the same for a text and for the chat that is made of it."""
    messages = row["messages"] or [{"role": "user", "content": row["prompt"]}]
    return json.dumps([[each["role"], each.get("content")] for each in messages if each["role"] != "system"])


def _system(row: Row) -> str | None:
    first = (row["messages"] or [{}])[0]
    return str(first["content"]) if first.get("role") == "system" else None


def _differs(system: str | None, systems: set[str | None]) -> bool:
    """Whether training has always another one; where each prompt has its own, having one is enough."""
    return system not in systems and (len(systems) == 1 or system is None)
