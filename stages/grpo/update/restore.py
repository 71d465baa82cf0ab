"""restore: an update done again from what is on disk and held against what it left. Nothing is written.

Rollouts, advantages and manifests are a redo log: configuration and execution are those of each manifest,
whatever pipeline.yaml and this process would choose now, and no layout is decided anew.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError

from grpo.artifacts import ActiveRun, Manifest, cannot_replay, check_source, kept_sources
from grpo.config import ModelOptions, TeacherConfig, UpdateConfig, differing_keys
from grpo.errors import InputError
from grpo.update.batch import read_kept
from grpo.update.collective import collective
from grpo.update.execution import execution_of
from grpo.update.learner import Learner
from grpo.update.outputs import logprobs_table, updates_table
from grpo.update.plan import OWN
from grpo.update.training import train

# What `checked` allows: no farther from the recorded policy than its sampler was, or than rounding.
_LEAST_NATS, _SHARE = 1e-5, 1e-2


@dataclass(frozen=True)
class Outcome:
    """How an update that was done again compares with what it left."""

    iteration: int
    differing: list[str]
    """Of weights, updates and logprobs, what is not equal bit for bit."""
    mean: float
    """Mean |difference| of a log-prob, in nats."""
    accepted: bool
    """Whether that is as equal as its execution promises."""
    execution: list[str]
    """What of the execution is another here: `threads: 2 -> 1`."""


def compare(run: ActiveRun, manifest: Manifest, recorded: ActiveRun, learner: Learner) -> Outcome:
    """Do an update again, which `learner` holds the policy and the reference for; hold it against the first.

    recorded: the run as_recorded(). Afterwards the learner holds the policy that the update made.
    """
    assert manifest.iteration is not None
    iteration = manifest.iteration
    with _threads(learner, manifest.execution["threads"]):
        learner.use(manifest.execution["layouts"])
        vocabulary = learner.model.config.get_text_config().vocab_size
        rollouts = read_kept(recorded, iteration, vocabulary)
        learner.holds = None
        rows, stored = train(recorded, iteration, rollouts, learner, lambda part: nullcontext())
        execution = execution_of(learner)
    learner.holds = manifest.ids["policy"]
    read = sorted(stored.first_step)
    found = {
        "updates": updates_table(recorded, rows),
        "logprobs": logprobs_table(iteration, rollouts, stored, read),
    }
    held = {name: run.read(name, iteration) for name in found}
    differing = [] if learner.digest() == manifest.summary["weights"] else ["weights"]
    # Read back, a table has every optional column.
    differing += [n for n, table in found.items() if not table.equals(held[n].select(table.column_names))]
    mean = _mean_difference(found["logprobs"], held["logprobs"])
    close = mean <= max(manifest.summary["mismatch_mean"] or 0.0, _LEAST_NATS)
    close = close and _close(found["updates"], held["updates"])
    accepted = not differing or (manifest.execution["determinism"] == "checked" and close)
    before = {key: value for key, value in manifest.execution.items() if key in execution}
    return Outcome(iteration, differing, mean, accepted, differing_keys(before, execution))


def as_recorded(run: ActiveRun, manifest: Manifest) -> ActiveRun:
    """The run under the configuration that an update was made with, as far as an update reads it."""
    held, execution = manifest.config, manifest.execution
    memory = {
        key: execution[key] for key in ("max_tokens_per_batch", "gradient_checkpointing", "prompt_sharing")
    }
    given = {**held["update"], **memory, "reference": run.config.update.reference}
    options = {**held.get("model_options", {}), "revision": run.config.model_options.revision}
    teachers = held.get("teachers", {}).items()
    try:
        config = run.config.model_copy(
            update={
                "seed": held["seed"],
                "iterations": held.get("iterations", run.config.iterations),
                "update": UpdateConfig.model_validate(given),
                "advantage": run.config.advantage.model_copy(
                    update={"max_policy_lag": held.get("max_policy_lag")}
                ),
                "model_options": ModelOptions.model_validate(options),
                "score": run.config.score.model_copy(
                    # Their log-probs are on disk: the models are not asked again.
                    update={
                        "teachers": [TeacherConfig(model=name, name=name, weight=w) for name, w in teachers]
                    }
                ),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise InputError(f"update {manifest.iteration}: {problem}; another version of grpo made it") from None
    found = ActiveRun(run.root, config, run.imports, run.console)
    found.start, found.accept_replay, found.ranks = run.start, run.accept_replay, run.ranks
    return found


def require_inputs(run: ActiveRun, manifest: Manifest) -> None:
    """Raise InputError (exit 4) unless all that the update read is there as it was."""
    if why := cannot_replay(run, manifest):
        raise InputError(f"update {manifest.iteration} {why}: it cannot be replayed")


def kept_surrogate(run: ActiveRun, manifest: Manifest) -> Path:
    """The file of the surrogate that an update was made with. Raises InputError (exit 4) without a copy."""
    digest = manifest.user_files[OWN]
    found = kept_sources(run).get(digest)
    if found is None:
        raise InputError(
            f"{OWN}: update {manifest.iteration}: the run has no copy of it; it cannot be replayed"
        )
    check_source(digest, found)
    return found


@contextmanager
def _threads(learner: Learner, number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    _compute_with(learner, number)
    try:
        yield
    finally:
        if learner.ranks is None or not learner.ranks.is_broken:
            _compute_with(learner, before)


@collective
def _compute_with(learner: Learner, threads: int) -> None:
    torch.set_num_threads(threads)


def _mean_difference(found: pa.Table, held: pa.Table) -> float:
    """Of the policy's log-probs, in nats; infinite where they are not of the same tokens."""
    one, other = (np.asarray(_tokens(table), dtype=np.float64) for table in (found, held))
    if one.shape != other.shape:
        return math.inf
    return float(np.abs(one - other).mean()) if len(one) else 0.0


def _tokens(logprobs: pa.Table) -> np.ndarray:
    values: np.ndarray = logprobs["policy_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values


def _close(found: pa.Table, held: pa.Table) -> bool:
    """Whether loss and gradient of each step are within _SHARE of what was recorded."""
    pairs = (
        (one[name] or 0.0, other[name] or 0.0)
        for one, other in zip(found.to_pylist(), held.to_pylist(), strict=False)
        for name in ("loss", "grad_norm")
    )
    return len(found) == len(held) and all(
        abs(one - other) <= _SHARE * max(abs(other), _LEAST_NATS) for one, other in pairs
    )
