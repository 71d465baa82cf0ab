"""policies: which policies of a run are on disk, and what the newest would be rebuilt from, to be shown."""

from typing import Any

from grpo.artifacts import Run, durable_policies, newest_policy, origin_of
from grpo.console import duration
from grpo.errors import CorruptError, InputError

_SHOWN = 8


def describe(run: Run) -> dict[str, Any]:
    """`on_disk`, `newest`, and the `updates` and their `seconds` that rebuilding it takes, or `gone`: why.

    `rebuilt`: updates that began from a policy rebuilt with other bits than it had.
    """
    newest, on_disk = newest_policy(run), durable_policies(run)
    found: dict[str, Any] = {"on_disk": on_disk, "newest": newest, "updates": 0, "seconds": 0.0, "gone": ""}
    updates = {number: run.manifest("update", number) for number in run.iterations()}
    found["rebuilt"] = [number for number, made in updates.items() if made and "rebuilt" in made.execution]
    try:
        origin = origin_of(run, newest)
    except (InputError, CorruptError) as error:
        return {**found, "gone": str(error)}
    seconds = sum(sum(run.timings("update", n).values()) for n in range(origin.durable, newest))
    return {**found, "updates": origin.updates, "seconds": seconds}


def line_of(found: dict[str, Any]) -> str:
    """`policies on disk 0, 40, 50; policy 53 is 3 updates from 50 (about 2 min)`."""
    on_disk = found["on_disk"]
    more = f"{len(on_disk) - _SHOWN} more, " if len(on_disk) > _SHOWN else ""
    text = f"policies on disk {more}{', '.join(map(str, on_disk[-_SHOWN:]))}"
    if found["gone"]:
        return f"{text}; {found['gone']}"
    if found["rebuilt"]:
        text += f"; rebuilt with other bits before update {', '.join(map(str, found['rebuilt']))}"
    if not found["updates"]:
        return text
    newest, updates = found["newest"], found["updates"]
    count = f"{updates} update{'' if updates == 1 else 's'}"
    return f"{text}; policy {newest} is {count} from {newest - updates} (about {duration(found['seconds'])})"
