"""update: policy + rollouts + advantages -> next policy, updates, logprobs.

The clipped objective on stored old log-probs. What is committed are the tables and the new policy's id: its
weights are in memory, and on disk now and then (durable.py). They follow from the tables (policies.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from grpo.artifacts import ActiveRun, Manifest, Product, Staging, id_of, keep_source, newest_policy
from grpo.errors import GrpoError, InputError, ResourceError
from grpo.update.adapter import check_modules, require_peft
from grpo.update.batch import Rollouts, longest, read_kept
from grpo.update.durable import Checkpoints
from grpo.update.execution import execution_of
from grpo.update.first_read import FirstRead
from grpo.update.inputs import check_same_training
from grpo.update.objective import objective_of
from grpo.update.optimizer import require_optimizer
from grpo.update.outputs import IDS, summary_of, write_outputs
from grpo.update.own_surrogate import surrogate_of
from grpo.update.plan import OUTPUT, OWN, policy_id, require_reference
from grpo.update.policies import Policies, new_learner
from grpo.update.schedule import check_schedule
from grpo.update.training import train
from grpo.update.world import check_learner, together


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Check what iterations before `until` need; no weight is read.

    Raises UsageError (exit 2) for processes that cannot train together, a schedule that ends before them, a
    surrogate that cannot be maximised, targets the model has not or a library that is missing, InputError
    (exit 4) where the next reference can be had no more, or what trains or the optimiser is another than
    before.
    """
    check_learner(run.config)
    check_schedule(run.config, until - 1)
    surrogate_of(run)
    done = (run.manifest(OUTPUT, number) for number in reversed(run.iterations()))
    if (last := next(filter(None, done), None)) is not None and last.iteration is not None:
        check_same_training(run, last)
        require_reference(run, last.iteration + 1)
    require_optimizer(run.config.update)
    if lora := run.config.update.lora:
        require_peft()
        check_modules(run.start["policy"], lora)


@contextmanager
def open_resource(run: ActiveRun, lend: object) -> Iterator[Policies]:
    """The policies of the run, with nothing loaded yet. What is in memory at the end is on disk then."""
    with together(run):
        checkpoints = Checkpoints(run)
        policies = Policies(run, new_learner(run), checkpoints)
        try:
            yield policies
            _write_held(policies, policies.made)
            checkpoints.flush()
        except ResourceError:
            raise
        except GrpoError:  # interrupted, say, or a reward that fails: who goes on need not rebuild
            with suppress(GrpoError):
                _write_held(policies, newest_policy(run))
            raise
        finally:
            checkpoints.close()


def release(policies: Policies) -> None:
    """Leave the accelerator to the next stage."""
    policies.learner.release()


def after(run: ActiveRun, manifest: Manifest, policies: Policies) -> None:
    """What is in memory is what was just committed; it is written where it is due."""
    policies.learner.holds = manifest.ids["policy"]
    assert manifest.iteration is not None
    assert policies.checkpoints is not None
    policies.made = manifest.iteration + 1
    policies.checkpoints.consider(policies.made, policies.learner)


def produce(run: ActiveRun, iteration: int, staging: Staging, policies: Policies) -> Product:
    """Train on the kept rollouts of one iteration: the next policy, in memory, and tables."""
    clock, learner = staging.clock, policies.learner
    with clock("load"):
        policies.begin(iteration, staging.plan.inputs)
        vocabulary = learner.model.config.get_text_config().vocab_size
        rollouts = read_kept(run, iteration, vocabulary)
        stale = _say_stale(run, iteration, rollouts)
    with clock("check"):
        before = run.manifest(OUTPUT, iteration - 1) if iteration > 0 else None
        lengths, last = longest(run, iteration), None
        if before is not None and longest(run, iteration - 1) == lengths:
            last = before.summary.get("layout")
        layout = learner.check_layout(rollouts, lengths, last)
        _say_refused(run, iteration, layout)
    if own := surrogate_of(run):
        if {OWN: own.sha256} != staging.plan.user_files:
            raise InputError(f"{OWN}: {own.file} changed as the update began; run it again")
        keep_source(run, own.sha256, own.file.name, own.file.read_bytes)
        learner.objective = objective_of(run.config.update, own)
    weights_before = before.summary["weights"] if before is not None else learner.digest()
    learner.holds = None  # until the commit has happened, memory is ahead of the disk
    first_read = FirstRead(run, iteration, rollouts, learner.network.precision)
    rows, stored = train(run, iteration, rollouts, learner, clock, first_read)
    with clock("write"):
        held = write_outputs(run, iteration, rows, rollouts, stored, learner, staging)
        weights = learner.digest()
    ids = {name: id_of(sorted(held[name], key=lambda file: file.name)) for name in IDS}
    ids["policy"] = policy_id(staging.plan, weights)
    summary = {**summary_of(rows), **stale, **layout, "weights": weights, "moved": weights != weights_before}
    execution = execution_of(learner)
    if policies.rebuilt:
        execution["rebuilt"], policies.rebuilt = policies.rebuilt, None
    return Product(ids, [file for files in held.values() for file in files], summary, execution)


def _write_held(policies: Policies, number: int | None) -> None:
    """Have a policy on disk, where that is the one in memory."""
    held = policies.learner.holds
    if number and held is not None and held == policies.run.id_of(f"policy@{number}"):
        policies.make_durable(number)


def _say_stale(run: ActiveRun, iteration: int, rollouts: Rollouts) -> dict[str, int]:
    """How many replayed rollouts are too old, for the manifest; nothing where any age will do."""
    most = run.config.advantage.max_policy_lag
    if most is None or not run.config.update.replay_iterations:
        return {}
    if rollouts.num_stale:
        why = f"their policy is more than {most} behind (advantage.max_policy_lag)"
        run.console.say(
            f"update {iteration}: {rollouts.num_stale} replayed rollouts are stale, and left out: {why}"
        )
    return {"stale": rollouts.num_stale}


def _say_refused(run: ActiveRun, iteration: int, layout: dict[str, Any]) -> None:
    for model in ("policy", "reference"):
        if refused := layout.get(f"{model}_layout_refused"):
            difference = layout[f"{model}_layout_difference"]
            run.console.say(
                f"update {iteration}: log-probs of the {model} in the layout `{refused}` are {difference:.1e}"
                " off; each rollout is read alone, which is right and slower"
            )
