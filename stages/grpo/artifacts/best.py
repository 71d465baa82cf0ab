"""artifacts.best: which policy measured is best, and whether a run goes on: from evaluations alone."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from grpo.artifacts import files
from grpo.artifacts.active import ActiveRun
from grpo.artifacts.layout import EVALUATION
from grpo.artifacts.manifest import Manifest, read_sealed, seal
from grpo.artifacts.partial import lacking
from grpo.artifacts.run import Run
from grpo.config import StopConfig
from grpo.errors import CorruptError, InputError


@dataclass(frozen=True)
class Best:
    """The best policy, its value, and of what that is: `pass@1 of correct`."""

    policy: int
    value: float
    measure: str


@dataclass(frozen=True)
class Stop:
    """Where a run ends before its iterations: the policy measured last, and what was not exceeded since."""

    policy: int
    best: Best
    patience: int
    min_delta: float
    at: str = ""
    """When that was found, in UTC; empty: now."""

    def __str__(self) -> str:
        above = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return (
            f"stopped at policy {self.policy}: {self.patience} evaluations without more{above} than"
            f" {self.best.value:.3f} {self.best.measure}, of policy {self.best.policy}"
        )


def measured(run: ActiveRun, policies: Iterable[int]) -> dict[int, float]:
    """Policy -> `stop.metric` of those that were measured as the last of them was, in order.

    Left out: an evaluation of other prompts or rewards, one that is not whole, one of a policy made again.
    """
    found = {policy: manifest for policy in policies if (manifest := _whole(run, policy))}
    if not found:
        return {}
    newest, values = _made_with(found[max(found)]), {}
    for policy, manifest in found.items():
        value = _value(manifest.summary, _metric(run))
        if value is not None and _made_with(manifest) == newest:
            values[policy] = value
    return values


def best_of(run: ActiveRun, policies: Iterable[int]) -> Best | None:
    """The best of some policies, the earliest of equals; None where none was measured."""
    return _best(run, measured(run, policies))


def require_best(run: ActiveRun) -> Best:
    """The best of a run. Raises InputError (exit 4) where no policy was measured."""
    best = best_of(run, run.evaluations())
    if best is None:
        raise InputError(
            f"run {run.name}: no policy was measured by {_metric(run)}; configure `evaluate` and"
            " `grpo evaluate --policy N`"
        )
    return best


def stop_at(run: ActiveRun, policy: int) -> Stop | None:
    """Whether `stop` ends the run at `policy` or before it; None: it goes on.

    Of the evaluations that `evaluate.every` asks for, and no others: what was measured by hand, or where
    `--until` ended, decides nothing.
    """
    stop, evaluate = run.config.stop, run.config.evaluate
    if stop is None or stop.patience is None or evaluate is None:
        return None
    values = measured(run, range(0, policy + 1, evaluate.every))
    last = ends_at(list(values.items()), stop.patience, stop.min_delta)
    best = _best(run, {number: value for number, value in values.items() if last is None or number <= last})
    return None if last is None or best is None else Stop(last, best, stop.patience, stop.min_delta)


def note_stop(run: ActiveRun, stop: Stop | None) -> None:
    """Keep in `stopped.json` what ended a run and when, for who reads it; None: it went on."""
    path, before = stopped_path(run), read_stop(run)
    if stop is None and before is not None:
        files.remove_file(path)
    elif stop is not None and (before is None or replace(before, at="") != stop):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        files.write_file(path, seal(asdict(replace(stop, at=now))))


def read_stop(run: Run) -> Stop | None:
    """What note_stop() kept. Raises CorruptError (exit 6) where it changed."""
    path = stopped_path(run)
    if not path.exists():
        return None
    data = read_sealed(path)
    try:
        return TypeAdapter(Stop).validate_python(data)
    except ValidationError as error:
        raise CorruptError(f"{path}: {error.errors()[0]['msg'].lower()}") from None


def stopped_path(run: Run) -> Path:
    """Where it is."""
    return run.path / "stopped.json"


def ends_at(values: list[tuple[int, float]], patience: int, min_delta: float) -> int | None:
    """The first policy that ends `patience` evaluations in a row without a better one; None: there is none.

    Better is above the best before it by more than `min_delta`, as in Keras' EarlyStopping.
    """
    best, waited = -math.inf, 0
    for policy, value in values:
        better = value > best + min_delta
        best, waited = (value, 0) if better else (best, waited + 1)
        if waited >= patience:
            return policy
    return None


def _best(run: ActiveRun, values: dict[int, float]) -> Best | None:
    if not values:
        return None
    policy = max(values, key=lambda number: (values[number], -number))
    manifest = run.manifest(EVALUATION, policy)
    metric, of = _metric(run), ""
    if manifest is not None and metric.startswith("pass@"):
        of = f" of {manifest.config['evaluate']['pass_reward']}"
    return Best(policy, values[policy], f"{metric}{of}")


def _metric(run: ActiveRun) -> str:
    return (run.config.stop or StopConfig()).metric


def _whole(run: ActiveRun, policy: int) -> Manifest | None:
    manifest = run.manifest(EVALUATION, policy)
    if manifest is None or lacking(run, manifest):
        return None
    same = all(run.id_of(reference) == id_ for reference, id_ in manifest.inputs.items())
    return manifest if same else None


def _made_with(manifest: Manifest) -> tuple[Any, ...]:
    """What its numbers depend on beside the policy and the engine."""
    return manifest.config["evaluate"], manifest.config["score"], manifest.user_files


def _value(summary: dict[str, Any], metric: str) -> float | None:
    kind, _, name = metric.partition("@" if metric.startswith("pass@") else ".")
    values = {"pass": summary["pass_at"], "rewards": summary["rewards"]}.get(kind)
    found: float | None = (values or {}).get(name) if name else summary["reward"]
    return found
