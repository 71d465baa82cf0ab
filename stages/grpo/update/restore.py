"""restore: updates done again from what is on disk and held against what they left. Nothing is written.

Rollouts, advantages and manifests are a redo log: configuration and execution are those of each manifest,
whatever pipeline.yaml and this process would choose now, and no layout is decided anew.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError

from grpo.artifacts import ActiveRun, Manifest, check_source, files, kept_sources
from grpo.config import ModelOptions, TeacherConfig, UpdateConfig, differing_keys
from grpo.errors import InputError
from grpo.models.loading import best_device
from grpo.update import inputs
from grpo.update.batch import read_kept
from grpo.update.checkpoint import policy_files
from grpo.update.execution import execution_of, weights_digest
from grpo.update.learner import Learner
from grpo.update.objective import objective_of
from grpo.update.outputs import logprobs_table, updates_table
from grpo.update.own_surrogate import surrogate_of
from grpo.update.plan import OUTPUT, OWN
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


class Replay:
    """The updates of a run one after another, beginning with policy 0.

    Raises InputError (exit 4) where an update cannot be done again: what it read was replaced, or an older
    grpo made it.
    """

    def __init__(self, run: ActiveRun) -> None:
        self.run = run
        self.learner: Learner | None = None
        self.attention = ""
        self._moved: tuple[int, TemporaryDirectory[str]] | None = None

    def __iter__(self) -> Iterator[Outcome]:
        iteration = 0
        while (manifest := self.run.manifest(OUTPUT, iteration)) is not None:
            yield self.outcome(iteration, manifest)
            iteration += 1

    def outcome(self, iteration: int, manifest: Manifest) -> Outcome:
        """Do the next update again; compare."""
        _require_inputs(self.run, manifest)
        recorded = as_recorded(self.run, manifest)
        learner = self._learner(recorded, manifest)
        with _threads(manifest.execution["threads"]):
            self._load(recorded, manifest, learner)
            learner.use(manifest.execution["layouts"])
            vocabulary = learner.model.config.get_text_config().vocab_size
            rollouts = read_kept(recorded, iteration, vocabulary)
            rows, stored = train(recorded, iteration, rollouts, learner, lambda part: nullcontext())
            execution = execution_of(learner)
        learner.holds = (manifest.ids["policy"], manifest.ids["optimizer"])
        read = sorted(stored.first_step)
        found = {
            "updates": updates_table(recorded, rows),
            "logprobs": logprobs_table(iteration, rollouts, stored, read),
        }
        held = {name: self.run.read(name, iteration) for name in found}
        differing = [] if weights_digest(learner.model) == manifest.summary["weights"] else ["weights"]
        # Read back, a table has every optional column.
        differing += [n for n, table in found.items() if not table.equals(held[n].select(table.column_names))]
        mean = _mean_difference(found["logprobs"], held["logprobs"])
        close = mean <= max(manifest.summary["mismatch_mean"] or 0.0, _LEAST_NATS)
        close = close and _close(found["updates"], held["updates"])
        accepted = not differing or (manifest.execution["determinism"] == "checked" and close)
        return Outcome(iteration, differing, mean, accepted, differing_keys(manifest.execution, execution))

    def _learner(self, recorded: ActiveRun, manifest: Manifest) -> Learner:
        config, attention = recorded.config.update, recorded.config.model_options.attn_implementation
        if self.learner is None:
            self.learner = Learner(config, best_device(), recorded.config.seed, attention)
            self.attention = attention
        elif attention != self.attention:
            change = f"{self.attention} -> {attention}"
            raise InputError(
                f"update {manifest.iteration}: model_options.attn_implementation changed ({change}), and a"
                " replay goes no further"
            )
        elif config != self.learner.config:
            self.learner.configure(config)
        if recorded.config.update.own is not None:
            own = surrogate_of(recorded, _kept(self.run, manifest))
            self.learner.objective = objective_of(config, own)
        return self.learner

    def _load(self, recorded: ActiveRun, manifest: Manifest, learner: Learner) -> None:
        """What is in memory is the policy, but before the first; the reference may be one on the way."""
        assert manifest.iteration is not None
        at, read = manifest.iteration, manifest.inputs
        if learner.holds == (None, None):
            inputs.load_policy(recorded, at, read, learner)
        if not recorded.config.update.kl_coefficient:
            return
        number = recorded.config.update.moved_reference(at)
        if number and number == at:
            self._keep(at, learner)
        if number and self._moved is not None and self._moved[0] == number:
            inputs.load_reference(recorded, at, read, learner, Path(self._moved[1].name))
        else:
            inputs.load_reference(recorded, at, read, learner, recorded.start["reference"])

    def _keep(self, number: int, learner: Learner) -> None:
        """Write the policy to a temporary folder: it is the reference from now on."""
        folder = TemporaryDirectory(prefix="grpo-replay-")
        for name, chunks in policy_files(learner.model, self.run.start["policy"]):
            files.write_chunks(Path(folder.name, name), chunks)
        self._moved = number, folder


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
    found.start = run.start
    return found


def _require_inputs(run: ActiveRun, manifest: Manifest) -> None:
    """Raise InputError (exit 4) unless all that the update read is there as it was."""
    if not manifest.execution or "weights" not in manifest.summary:
        raise InputError(
            f"update {manifest.iteration}: an older grpo made it, which did not record its execution and a"
            " digest of its weights; it cannot be replayed"
        )
    for reference, id_ in manifest.inputs.items():
        if run.id_of(reference) != id_:
            raise InputError(
                f"update {manifest.iteration}: it was made from another {reference} than the one that is"
                " there; it cannot be replayed"
            )


def _kept(run: ActiveRun, manifest: Manifest) -> Path:
    digest = manifest.user_files[OWN]
    found = kept_sources(run).get(digest)
    if found is None:
        raise InputError(
            f"{OWN}: update {manifest.iteration}: the run has no copy of it; it cannot be replayed"
        )
    check_source(digest, found)
    return found


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
