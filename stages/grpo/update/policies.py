"""policies: the policies of a run, held by a learner: from memory, from disk, or rebuilt by a replay."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from grpo.artifacts import (
    POLICY,
    ActiveRun,
    Manifest,
    files,
    held_part,
    is_durable,
    lent_prefix,
    origin_of,
)
from grpo.console import duration
from grpo.errors import CorruptError, EngineError, InputError
from grpo.models.loading import best_device
from grpo.models.turns import share_of
from grpo.update import gradient_checkpointing
from grpo.update.adapter import adapter_files
from grpo.update.checkpoint import policy_files
from grpo.update.durable import Checkpoints
from grpo.update.inputs import load_policy, say_notes
from grpo.update.learner import Learner
from grpo.update.objective import objective_of
from grpo.update.own_surrogate import surrogate_of
from grpo.update.plan import OUTPUT, reference_of, require_reference
from grpo.update.restore import Outcome, as_recorded, compare, kept_surrogate, require_inputs
from grpo.update.world import together

_OWN_PREFIX = ".policy-"


class Policies:
    """A learner and the policies that it can come to hold.

    checkpoints: told of each policy that it holds on the way; None: nothing is written into the run.
    """

    def __init__(self, run: ActiveRun, learner: Learner, checkpoints: Checkpoints | None = None) -> None:
        self.run, self.learner = run, learner
        self.config = learner.config
        """The run's, as this machine computes it; a replay has that of each manifest."""
        self.checkpoints = checkpoints
        self.made: int | None = None
        """The policy that an update of this command made last."""
        self.rebuilt: dict[str, object] | None = None
        """Of the last replay that was accepted without the same bits: what the next update records."""

    def begin(self, iteration: int, inputs: Mapping[str, str]) -> None:
        """Hold what the update of `iteration` begins with: policy, optimiser state, reference.

        inputs: as its plan has them. Raises InputError (exit 4) for what can be had no more or is of another
        kind than is configured, CorruptError (exit 6) for what changed, EngineError (exit 8) where a replay
        gives another policy.
        """
        self.flush()
        self.hold(iteration)
        require_reference(self.run, iteration)
        self._hold_reference(self.run, iteration, inputs)

    def hold(self, policy: int) -> None:
        """Have the learner hold a policy under the run's configuration. Raises as begin()."""
        run, learner = self.run, self.learner
        if learner.holds != run.id_of(f"policy@{policy}"):
            self._restore(policy)
        else:
            learner.resume()
        if learner.config != self.config:
            learner.configure(self.config)

    def flush(self) -> None:
        """Wait for what is being written, before what the learner holds changes."""
        if self.checkpoints is not None:
            self.checkpoints.flush()

    def keep(self, policy: int) -> None:
        """Begin to write a policy, rebuilt where need be, unless it is on disk. Raises as begin().

        Checkpoints that `checkpoints` keeps no longer are removed.
        """
        assert self.checkpoints is not None
        self.flush()
        if is_durable(self.run, policy):
            self.checkpoints.prune()
            return
        self.hold(policy)
        self.checkpoints.write(policy, self.learner)

    def make_durable(self, policy: int) -> None:
        """The same; it is on disk when this returns. Raises ResourceError (exit 7) too."""
        self.keep(policy)
        self.flush()

    def redo(self, manifest: Manifest) -> Outcome:
        """Do an update again, with its own configuration; the learner holds what it made, as far as equal."""
        assert manifest.iteration is not None
        at = manifest.iteration
        require_inputs(self.run, manifest)
        self._require_processes(manifest)
        recorded = self._recorded(at)
        if self.learner.holds != self.run.id_of(f"policy@{at}"):
            load_policy(recorded, at, self.learner)
        self._hold_reference(recorded, at, manifest.inputs)
        return compare(self.run, manifest, recorded, self.learner)

    def _restore(self, policy: int) -> None:
        self.flush()
        run, learner, origin = self.run, self.learner, origin_of(self.run, policy)
        between = range(policy - 1, origin.durable, -1)
        first = next((n for n in between if learner.holds == run.id_of(f"policy@{n}")), origin.durable)
        try:
            if first == origin.durable:
                load_policy(run if first == policy else self._recorded(first), first, learner)
        except CorruptError:
            if is_durable(run, first):
                raise
            self._restore(policy)  # a command that works on the run has dropped it meanwhile
            return
        if first == policy:
            return
        updates = [run.require(OUTPUT, number, "grpo run") for number in range(first, policy)]
        seconds = sum(sum(run.timings(OUTPUT, number).values()) for number in range(first, policy))
        count = f"{len(updates)} update{'' if len(updates) == 1 else 's'}"
        what = f"policy {policy} is not on disk: rebuilding it from policy {first}"
        run.console.say(f"{what} ({count}, about {duration(seconds)})")
        with run.console.progress(f"rebuild {policy}", len(updates), "updates") as advance:
            for manifest in updates:
                run.console.stop_requested()
                outcome = self.redo(manifest)
                self._accept(outcome)
                advance(1)
                if self.checkpoints is not None:
                    self.checkpoints.consider(outcome.iteration + 1, learner)
                    self.flush()

    def _recorded(self, iteration: int) -> ActiveRun:
        """The run as it was when the update of an iteration was made; the learner is configured so."""
        manifest = self.run.require(OUTPUT, iteration, f"grpo update --iteration {iteration}")
        recorded = as_recorded(self.run, manifest)
        self._configure(recorded, manifest)
        return recorded

    def _accept(self, outcome: Outcome) -> None:
        """Raise EngineError (exit 8) for an outcome that is not as equal as its execution promises."""
        if not outcome.accepted and not self.run.accept_replay:
            self.learner.holds = None
            but = f"; its execution here: {', '.join(outcome.execution)}" if outcome.execution else ""
            raise EngineError(
                f"update {outcome.iteration}: a replay gives other {', '.join(outcome.differing)} (log-probs"
                f" {outcome.mean:.1e} nats off){but}; policy {outcome.iteration + 1} is not rebuilt: run it"
                f" as it was run, take what comes with --accept-replay, or `grpo run --from"
                f" {outcome.iteration}` makes another"
            )
        if outcome.differing:
            mean = outcome.mean if math.isfinite(outcome.mean) else None
            self.rebuilt = {"policy": outcome.iteration + 1, "mean_difference": mean}
            apart = "of other tokens" if mean is None else f"{mean:.1e} nats per token off"
            self.run.console.say(f"policy {outcome.iteration + 1} is rebuilt with other bits: {apart}")

    def _require_processes(self, manifest: Manifest) -> None:
        """Raise InputError (exit 4) for an update of other processes: they round otherwise."""
        made, copies = manifest.execution["processes"], manifest.execution.get("replicas", 1)
        ranks = self.run.ranks
        now = (1, 1) if ranks is None else (ranks.world, ranks.replicas)
        if (made, copies) != now and not self.run.accept_replay:
            way = "one alone replays it"
            if copies > 1:
                way = f"execution.learner: {{processes: {made}, replicas: {copies}}} replays it"
            elif made > 1:
                way = f"execution.learner.processes: {made} replays it, or torchrun with as many"
            raise InputError(
                f"update {manifest.iteration}: was made by {made} process{'es' if made > 1 else ''}"
                f"{_in(copies)}, and a replay by {now[0]}{_in(now[1])} rounds otherwise; {way}"
            )

    def _configure(self, recorded: ActiveRun, manifest: Manifest) -> None:
        learner, config = self.learner, recorded.config.update
        attention = recorded.config.model_options.attn_implementation
        if attention != learner.attention:
            change = f"{attention} -> {learner.attention}"
            raise InputError(
                f"update {manifest.iteration}: model_options.attn_implementation changed ({change}), and a"
                " replay needs it as it was"
            )
        if config != learner.config:
            learner.configure(config)
        if config.own is not None:
            own = surrogate_of(recorded, kept_surrogate(self.run, manifest))
            learner.objective = objective_of(config, own)

    def _hold_reference(self, run: ActiveRun, iteration: int, inputs: Mapping[str, str]) -> None:
        config = run.config.update
        if not config.kl_coefficient:
            return
        id_ = inputs[reference_of(config, iteration)]
        number, is_start = config.moved_reference(iteration), id_ == run.id_of("policy@0")
        with ExitStack() as held:
            folder = run.start["reference"]
            if number and id_ != self.learner.reference_id:
                folder = held.enter_context(self._as_checkpoint(number, id_))
            self.learner.load_reference(folder, id_, is_start=is_start)
        say_notes(run)

    @contextmanager
    def _as_checkpoint(self, number: int, id_: str) -> Iterator[Path]:
        """A plain checkpoint of a policy; one that is not on disk as such is written for the while."""
        if (folder := held_part(self.run, number, POLICY)) is not None:
            yield folder
            return
        other = self if self.learner.holds == id_ else Policies(self.run, new_learner(self.run))
        if other is not self:
            other.hold(number)
        shared = None if self.run.ranks is None else self.run.path  # a folder that all machines see
        # What a kill leaves goes with the next command that holds the run; that one takes no other's.
        prefix = lent_prefix(self.run) if self.run.is_held else _OWN_PREFIX
        with TemporaryDirectory(dir=shared, prefix=prefix) as name:
            _write(other, POLICY, Path(name))
            del other  # its memory is not needed by whoever reads the files
            yield Path(name)


def _in(replicas: int) -> str:
    return f" in {replicas} replicas" if replicas > 1 else ""


def new_learner(run: ActiveRun) -> Learner:
    """One of the run's configuration, with nothing loaded yet."""
    share = share_of(run.config.generate.engine_options)
    attention = run.config.model_options.attn_implementation
    update, device, seed = gradient_checkpointing.resolve(run), best_device(), run.config.seed
    return Learner(update, device, seed, attention, share, run.ranks)


@contextmanager
def rebuilt_part(run: ActiveRun, policy: int, part: str, scratch: Path) -> Iterator[Path]:
    """A whole policy, or its adapter, as files below `scratch`, under the configuration it was made with.

    Nothing of the run is changed. Raises as begin().
    """
    update = run.require(OUTPUT, policy - 1, f"grpo update --iteration {policy - 1}")
    with together(run), TemporaryDirectory(dir=scratch, prefix=_OWN_PREFIX) as name:
        recorded = as_recorded(run, update)
        policies = Policies(recorded, new_learner(recorded))
        policies.hold(policy)
        _write(policies, part, Path(name))
        del policies  # its memory is not needed by whoever reads the files
        yield Path(name)


def _write(policies: Policies, part: str, folder: Path) -> None:
    model, adapter = policies.learner.whole()
    if part == POLICY:
        for name, chunks in policy_files(model, policies.run.start["policy"]):
            files.write_chunks(folder / name, chunks)
    elif adapter is not None:
        for name, content in adapter_files(adapter):
            files.write_chunks(folder / name, [content])
