"""compare.many: runs beside each other, as after a sweep: the keys that differ, and what each came to."""

import json
from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun, best_of, created_config
from grpo.config import SECTION, flatten
from grpo.inspect import outdated
from grpo.inspect.compare import measures
from grpo.inspect.compare.runs import KEY_OF, LAST, ORDER, shared

Row = dict[str, Any]


def describe(runs: list[ActiveRun], wanted: str) -> Row:
    """Everything `grpo compare A B C ...` shows, as plain data. UsageError (exit 2) for none shared.

    `numbers`: means over the last iterations that all have; what was spent up to them; and of evaluations the
    last, of whichever policy.
    """
    common, chosen = shared(runs, wanted)
    outdated.say(runs, chosen)
    names, last = [run.name for run in runs], chosen[-LAST:]
    values = {"runs": names, "first": last[0], "last": last[-1]}
    rows = sql.read(runs, sql.own_text("inspect/compare/many"), values).to_pylist(maps_as_pydicts="strict")
    rows.sort(key=lambda row: (ORDER.index(row["name"].partition(".")[0]), row["name"]))
    best = [best_of(run, run.evaluations()) for run in runs]
    return {
        "compared": "runs",
        "runs": names,
        "common_iterations": common,
        "configuration": _configuration(runs),
        "first": last[0],
        "last": last[-1],
        "numbers": [
            {"name": row["name"], "values": [row["values"].get(name) for name in names]} for row in rows
        ],
        "best": [
            each and {"policy": each.policy, "value": each.value, "measure": each.measure} for each in best
        ],
        "passing": measures.passing(runs, last[-1]),
        "measured_otherwise": measures.differing(runs, last[-1]),
    }


def _configuration(runs: list[ActiveRun]) -> dict[str, list[Any]]:
    """Keys of run.json that differ -> the value in each run, null where it has no such key."""
    every = []
    for run in runs:
        values = created_config(run.path).model_dump(exclude={"run": True})
        rewards = {reward.pop("name"): reward for reward in values["score"]["rewards"]}
        values["score"]["rewards"] = rewards
        every.append(flatten(values))
    keys = dict.fromkeys(key for values in every for key in values)
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}  # null in a run
    found = {}
    for key in keys:
        held = [values[key] for values in every if key in values]
        if (
            any(key.startswith(f"{section}.") for section in sections)
            and len(set(map(json.dumps, held))) == 1
        ):
            continue  # the line of the section says it
        found[key] = [values.get(key, SECTION if key in sections else None) for values in every]
    differing = {key: values for key, values in found.items() if len({json.dumps(v) for v in values}) > 1}
    for reference, key in KEY_OF.items():
        ids = [run.id_of(reference) or "" for run in runs]
        if len({*ids} - {""}) > 1:  # the same name for other content
            differing.setdefault(f"{key} (content)", [id_[:8] for id_ in ids])
    return differing
