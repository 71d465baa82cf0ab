"""evaluations: an evaluation as a line of the log or a table, from the summary in its manifest."""

from pathlib import Path
from typing import Any

from grpo import sql
from grpo.artifacts import EVALUATION, ActiveRun, Run
from grpo.console import interval, number, printable, stdout_console, table
from grpo.inspect import query

_NUMBERS = (
    *("prompts", "samples", "unscored", "failed", "pass_at", "pass_at_low", "pass_at_high"),
    *("reward", "reward_low", "reward_high", "rewards", "response_tokens", "truncated"),
)
_MADE_WITH = ("samples_per_prompt", "temperature", "max_new_tokens", "pass_reward", "pass_threshold")


def numbers_of(run: Run, policy: int) -> dict[str, Any]:
    """What an evaluation came to, as `evals` has it, and how it was made; empty where there is none."""
    manifest = run.manifest(EVALUATION, policy)
    if manifest is None:
        return {}
    return {
        "policy": policy,
        **{name: manifest.summary[name] for name in _NUMBERS},
        **{key: manifest.config["evaluate"][key] for key in _MADE_WITH},
        "seconds": sum(run.timings(EVALUATION, policy).values()),
    }


def delivered(run: ActiveRun, policy: int, out: Path | None) -> dict[str, Any]:
    """numbers_of(), and its rows of `eval_samples` written to `out`, where that is given."""
    if out is not None:
        rows = "select * from eval_samples where iteration = $policy order by group_id, sample_id"
        found = sql.read([run], rows, {"policy": policy})
        query.write(sql.Rows(found.schema, iter(found.to_batches())), out)
    return numbers_of(run, policy)


def line_of(run: Run, policy: int) -> str:
    """One line for the log of `grpo run`."""
    found = numbers_of(run, policy)
    of = f" of {found['pass_reward']}"
    known = [
        f"{name}{of} {value:.3f} ({interval(low, high)})" for name, value, low, high in _shares(found)[:1]
    ]
    known += [f"{name} {value:.3f}" for name, value, _, _ in _shares(found)[1:][-1:]]
    if found["reward"] is not None:
        known.append(f"reward {found['reward']:.3f}")
    known.append(f"length {found['response_tokens']:.1f}")
    unscored = f"  {found['unscored']} of {found['samples']} unscored" if found["unscored"] else ""
    return f"{'policy':<9} {policy:>4}  {'  '.join(known)}{unscored}  {found['seconds']:.2f} s"


def print_evaluation(what: str, found: dict[str, Any]) -> None:
    """The table of `grpo evaluate`. what: the policy measured, in words."""
    samples, greedy = found["samples_per_prompt"], found["temperature"] == 0
    how = "greedy" if greedy else f"{samples} responses each, temperature {found['temperature']:g}"
    passing = f"pass: {found['pass_reward']} >= {found['pass_threshold']:g}"
    measures = [
        *_shares(found),
        ("reward", found["reward"], found["reward_low"], found["reward_high"]),
        *((f"reward {name}", value, None, None) for name, value in found["rewards"].items()),
        ("length", found["response_tokens"], None, None),
        ("truncated", found["truncated"], None, None),
    ]
    cells = [(name, number(value), interval(low, high)) for name, value, low, high in measures]
    out = stdout_console()
    out.print(printable(f"{what}: {found['prompts']:,} prompts, {how}; {passing}"), soft_wrap=True)
    out.print(table(("measure", "value", "95 % interval"), cells, left=("measure", "95 % interval")))
    if found["unscored"]:
        missing = f"{found['unscored']} of {found['samples']} responses"
        text = f"{missing} have no {found['pass_reward']}, and do not count in pass@k"
        out.print(text, soft_wrap=True)


def _shares(found: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(pass@k, value, low, high) by k; none where no response was scored."""
    return [
        (f"pass@{k}", value, found["pass_at_low"][k], found["pass_at_high"][k])
        for k, value in (found["pass_at"] or {}).items()
    ]
