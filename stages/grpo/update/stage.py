"""update: policy + rollouts + advantages -> next policy, updates, logprobs.

The clipped objective on stored old log-probs. Weights, optimiser state and tables are one output: they
cannot disagree.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo.artifacts import ActiveRun, Manifest, Product, Staging, id_of, keep_source, prune_behind
from grpo.errors import InputError
from grpo.models.loading import best_device
from grpo.update import checkpointing
from grpo.update.adapter import check_modules, require_peft
from grpo.update.batch import longest, read_kept
from grpo.update.execution import execution_of, weights_digest
from grpo.update.inputs import check_optimizer, load
from grpo.update.learner import Learner
from grpo.update.objective import objective_of
from grpo.update.optimizer import require_optimizer
from grpo.update.outputs import IDS, summary_of, write_outputs
from grpo.update.own_surrogate import surrogate_of
from grpo.update.plan import OUTPUT, OWN, require_reference
from grpo.update.schedule import check_schedule
from grpo.update.training import train


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Check what iterations before `until` need; no weight is read.

    Raises UsageError (exit 2) for a schedule that ends before them, a surrogate that cannot be maximised,
    targets the model has not or a library that is missing, InputError (exit 4) where the next reference was
    pruned or the optimiser is another one than before.
    """
    check_schedule(run.config, until - 1)
    surrogate_of(run)
    done = (run.manifest(OUTPUT, number) for number in reversed(run.iterations()))
    if (last := next(filter(None, done), None)) is not None and last.iteration is not None:
        check_optimizer(run, last)
        require_reference(run, last.iteration + 1)
    require_optimizer(run.config.update)
    if lora := run.config.update.lora:
        require_peft()
        check_modules(run.start["policy"], lora)


@contextmanager
def open_resource(run: ActiveRun) -> Iterator[Learner]:
    """The learner, with nothing loaded yet."""
    attention = run.config.model_options.attn_implementation
    yield Learner(checkpointing.settle(run), best_device(), run.config.seed, attention)


def release(learner: Learner) -> None:
    """Leave the accelerator to the next stage."""
    learner.release()


def after(run: ActiveRun, manifest: Manifest, learner: Learner) -> None:
    """What is in memory is what was just committed; checkpoints that are no longer kept go."""
    learner.holds = (manifest.ids["policy"], manifest.ids["optimizer"])
    assert manifest.iteration is not None
    prune_behind(run, manifest.iteration)


def produce(run: ActiveRun, iteration: int, staging: Staging, learner: Learner) -> Product:
    """Train on the kept rollouts of one iteration: policy, optimiser state and tables."""
    clock = staging.clock
    with clock("load"):
        load(run, iteration, staging.plan.inputs, learner)
        vocabulary = learner.model.config.get_text_config().vocab_size
        rollouts = read_kept(run, iteration, vocabulary)
    with clock("check"):
        before = run.manifest(OUTPUT, iteration - 1) if iteration > 0 else None
        last = before.summary.get("layout") if before is not None else None
        layout = learner.check_layout(rollouts, longest(run, iteration), last)
        _say_refused(run, iteration, layout)
    if own := surrogate_of(run):
        if {OWN: own.sha256} != staging.plan.user_files:
            raise InputError(f"{OWN}: {own.file} changed as the update began; run it again")
        keep_source(run, own.sha256, own.file.name, own.file.read_bytes)
        learner.objective = objective_of(run.config.update, own)
    learner.holds = (None, None)  # until the commit has happened, memory is ahead of the disk
    rows, stored = train(run, iteration, rollouts, learner, clock)
    with clock("write"):
        held = write_outputs(run, iteration, rows, rollouts, stored, learner, staging)
    ids = {name: id_of(sorted(held[name], key=lambda file: file.name)) for name in IDS if held[name]}
    summary = {**summary_of(rows), **layout, "weights": weights_digest(learner.model)}
    return Product(ids, [file for files in held.values() for file in files], summary, execution_of(learner))


def _say_refused(run: ActiveRun, iteration: int, layout: dict[str, Any]) -> None:
    for model in ("policy", "reference"):
        if refused := layout.get(f"{model}_layout_refused"):
            difference = layout[f"{model}_layout_difference"]
            run.console.say(
                f"update {iteration}: log-probs of the {model} in the layout `{refused}` are {difference:.1e}"
                " off; each rollout is read alone, which is right and slower"
            )
