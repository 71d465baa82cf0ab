"""inputs: what an update begins with, from disk: a policy with its optimiser state, and the reference."""

from grpo.artifacts import ADAPTER, CHECKPOINT, OPTIMIZER, POLICY, ActiveRun, Manifest, held_part
from grpo.errors import CorruptError, InputError
from grpo.update.learner import Learner
from grpo.update.plan import OUTPUT


def load_policy(run: ActiveRun, number: int, learner: Learner) -> None:
    """Take a durable policy and its optimiser state from disk.

    Raises InputError (exit 4) for one of another kind than this configuration trains, CorruptError (exit 6)
    for what changed, or is not what its update made.
    """
    id_, folder = run.id_of(f"policy@{number}"), run.start["policy"]
    if number == 0:
        learner.load(folder, None, id_)
        say_notes(run)
        return
    update = run.require(OUTPUT, number - 1, f"grpo update --iteration {number - 1}")
    check_same_training(run, update)
    state, adapter = held_part(run, number, OPTIMIZER), held_part(run, number, ADAPTER)
    policy = folder if adapter is not None else held_part(run, number, POLICY)
    place = run.folder(CHECKPOINT, number - 1)
    if policy is None or state is None:
        raise CorruptError(f"{place}: holds no whole policy with its optimiser state")
    learner.load(policy, state, id_, adapter)
    say_notes(run)
    written = run.require(CHECKPOINT, number - 1, "grpo run").summary["weights"]
    if learner.digest() != written:
        learner.holds = None
        raise CorruptError(f"{place}: its weights are not those that its manifest says")


def say_notes(run: ActiveRun) -> None:
    """What loading had to say, of several processes."""
    while run.ranks is not None and run.ranks.notes:
        run.console.say(run.ranks.notes.pop(0))


def check_same_training(run: ActiveRun, last: Manifest) -> None:
    """Raise InputError (exit 4) where what `last` trained, or its optimiser, is not what is configured."""
    before, now = last.config["update"], run.config.update
    if bool(before.get("lora")) != bool(now.lora):
        trained = "an adapter" if before.get("lora") else "all weights"
        raise InputError(f"update.lora: {run.name} trains {trained}; what trains is fixed for a run")
    if (optimizer := before.get("optimizer", "adamw")) != now.optimizer:
        raise InputError(
            f"update.optimizer: {run.name} has {optimizer}, found {now.optimizer}; it is fixed for a run"
        )
