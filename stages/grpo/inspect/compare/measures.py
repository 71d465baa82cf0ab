"""compare.measures: numbers of one name that are not one measure: another reward, weight or threshold."""

from collections.abc import Sequence
from typing import Any

from grpo import sql
from grpo.artifacts import EVALUATION, Manifest, Run

_NO_PART = ("weight", "timeout_s")  # of what a reward gives


def differing(runs: Sequence[Run], iteration: int) -> dict[str, str]:
    """Name of a number of `iterations` or `evals` -> what it is in each run, where that is not the same.

    As the rewards of `iteration` were made, and the last evaluation.
    """
    scored = [run.manifest("rewards", iteration) for run in runs]
    held = [manifest for manifest in scored if manifest is not None]
    measured = [run.manifest(EVALUATION, max(run.evaluations(), default=0)) for run in runs]
    found: dict[str, str] = {}
    if len(held) == len(runs):
        for name in sorted(set.intersection(*(set(_rewards(each)) for each in held))):
            if _differ([_made(each, name) for each in held]):
                found[f"rewards.{name}"] = f"{name} is not computed in the same way"
        if _differ([_sum(each) for each in held]):
            found["reward"] = _told(runs, [_sum_text(each) for each in held], "a sum of the same names")
        counted = passing(runs, iteration)
        names = [counted[run.name].rpartition(" >= ")[0] for run in runs]
        if _differ([*counted.values()]) or _differ([_made(*each) for each in zip(held, names, strict=True)]):
            found["pass_rate"] = _told(runs, [*counted.values()], "a reward of the same name")
    evaluated = [manifest for manifest in measured if manifest is not None]
    if len(evaluated) == len(runs):
        texts = [_passing(each) for each in evaluated]
        made = [_made(each, each.config["evaluate"]["pass_reward"]) for each in evaluated]
        if _differ(texts) or _differ(made):
            found["eval_pass_at_1"] = _told(runs, texts, "a reward of the same name")
        if _differ([_sum(each) for each in evaluated]):
            sums = [_sum_text(each) for each in evaluated]
            found["eval_reward"] = _told(runs, sums, "a sum of the same names")
    return found


def passing(runs: Sequence[Run], iteration: int) -> dict[str, str]:
    """Name of a run -> what `pass_rate` counts in it; an evaluation changes that, and so does having none."""
    query = "select run, pass_reward, pass_threshold from _pass_settings"
    rows = sql.read(runs, query, iteration=iteration).to_pylist()
    texts = {row["run"]: f"{row['pass_reward']} >= {row['pass_threshold']:g}" for row in rows}
    return {run.name: texts.get(run.name, "") for run in runs}


def counted(found: dict[str, str]) -> list[str]:
    """What `pass_rate` counts, where that is the same in all; differing() says where it is not."""
    same = {*found.values()}
    return [f"pass_rate counts {text}" for text in same if text and len(same) == 1]


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _told(runs: Sequence[Run], texts: list[str], same: str) -> str:
    """`a: correct; b: correct + 0.5 brevity`, or that what is behind equal words differs."""
    if _differ(texts):
        return "; ".join(f"{run.name}: {text}" for run, text in zip(runs, texts, strict=True))
    return f"{same}, {texts[0]}, that is not computed in the same way"


def _rewards(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = manifest.config["score"]["rewards"]
    return found


def _made(manifest: Manifest, name: str) -> Any:
    """What a reward's value depends on: its configuration and its source."""
    values = {key: value for key, value in _rewards(manifest).get(name, {}).items() if key not in _NO_PART}
    return values, manifest.user_files.get(f"score.rewards.{name}")


def _sum(manifest: Manifest) -> dict[str, Any]:
    """What the weighted sum depends on."""
    weights = {name: reward["weight"] for name, reward in _rewards(manifest).items()}
    return {name: (weight, _made(manifest, name)) for name, weight in weights.items() if weight}


def _sum_text(manifest: Manifest) -> str:
    parts = [
        name if (weight := reward["weight"]) == 1 else f"{weight:g} {name}"
        for name, reward in _rewards(manifest).items()
        if reward["weight"]
    ]
    return " + ".join(parts) or "none"


def _passing(manifest: Manifest) -> str:
    made = manifest.config["evaluate"]
    return f"{made['pass_reward']} >= {made['pass_threshold']:g}"
