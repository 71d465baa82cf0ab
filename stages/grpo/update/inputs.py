"""inputs: the policy, its optimiser state and the reference that an update begins with, for the learner."""

from collections.abc import Mapping
from pathlib import Path

from grpo.artifacts import ActiveRun, Manifest, Run
from grpo.errors import InputError
from grpo.update.learner import Learner
from grpo.update.plan import OUTPUT, reference_of, require_reference


def load(run: ActiveRun, iteration: int, inputs: Mapping[str, str], learner: Learner) -> None:
    """Take what the update of `iteration` begins with from disk, unless it is what is in memory.

    inputs: as its plan or manifest has them. Raises InputError (exit 4) for what was pruned or is of another
    kind than this configuration trains, CorruptError (exit 6) for what changed.
    """
    load_policy(run, iteration, inputs, learner)
    if run.config.update.kl_coefficient:
        require_reference(run, iteration)
        number = run.config.update.moved_reference(iteration)
        checkpoint = run.policy_folder(number) if number else run.start["reference"]
        load_reference(run, iteration, inputs, learner, checkpoint)


def load_policy(run: ActiveRun, iteration: int, inputs: Mapping[str, str], learner: Learner) -> None:
    """Its policy and optimiser state alone."""
    optimizer = adapter = None
    policy = run.policy_folder(iteration)
    if iteration > 0:
        manifest = run.require(OUTPUT, iteration - 1, f"grpo update --iteration {iteration - 1}")
        [optimizer] = _verified(run, manifest, "optimizer")
        weights = _verified(run, manifest, "adapter")
        if bool(weights) != bool(run.config.update.lora):
            trained = "an adapter" if weights else "all weights"
            raise InputError(f"update.lora: {run.name} trains {trained}; what trains is fixed for a run")
        check_optimizer(run, manifest)
        if weights:
            policy, adapter = run.start["policy"], weights[0].parent
    ids = (inputs[f"policy@{iteration}"], inputs.get(f"optimizer@{iteration}"))
    learner.load(policy, optimizer, ids, adapter)


def load_reference(
    run: ActiveRun, iteration: int, inputs: Mapping[str, str], learner: Learner, checkpoint: Path
) -> None:
    """Its reference alone, of which `checkpoint` is a copy."""
    id_ = inputs[reference_of(run.config.update, iteration)]
    learner.load_reference(checkpoint, id_, is_start=id_ == run.id_of("policy@0"))


def check_optimizer(run: ActiveRun, last: Manifest) -> None:
    """Raise InputError (exit 4) where the state that `last` left is of another optimiser."""
    before, now = last.config["update"].get("optimizer", "adamw"), run.config.update.optimizer
    if before != now:
        raise InputError(f"update.optimizer: {run.name} has {before}, found {now}; it is fixed for a run")


def _verified(run: Run, manifest: Manifest, part: str) -> list[Path]:
    """The files of a part of an update, once they are known to be as they were written."""
    records = [record for record in manifest.files if record.part == part]
    paths = [run.path_of(record, OUTPUT, manifest.iteration) for record in records]
    for record, path in zip(records, paths, strict=True):
        run.verify(record, path)
    return paths
