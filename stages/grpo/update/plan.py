"""update, planned: what the next policy depends on."""

from pathlib import Path

from grpo.artifacts import ActiveRun, Plan, digest, origin_of
from grpo.artifacts.files import sha256_of
from grpo.config import UpdateConfig
from grpo.config.named_files import named_file
from grpo.errors import InputError
from grpo.models.device import gpu_is_there

NAME = "update"
OUTPUT = "update"
STAGE_VERSION = 2  # 2: groups are read as trees, which rounds otherwise
# Memory and time only, but for rounding; the reference counts by its id.
_NOT_RESULT = {"max_tokens_per_batch", "gradient_checkpointing", "prompt_sharing", "reference"}

OWN = "update.surrogate"


def plan(run: ActiveRun, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when an input is missing."""
    references = [f"policy@{iteration}"]
    for number in iterations_of(run, iteration):
        run.require("rollouts", number, f"grpo generate --iteration {number}")
        run.require("advantages", number, f"grpo advantage --iteration {number}")
        references += [f"rollouts@{number}", f"advantages@{number}"]
        references += [f"teacher/{each.name}@{number}" for each in run.config.score.teachers]
    update = run.config.update
    if update.entropy_target is not None and iteration > 0:
        references.append(f"updates@{iteration - 1}")
    if update.kl_coefficient:
        references.append(reference_of(update, iteration))
    recorded = resolved(update, on_gpu=gpu_is_there()).recorded(_NOT_RESULT)
    config = {"seed": run.config.seed, "update": recorded, **run.config.loaded_with()}
    if update.schedule != "constant" or update.warmup_share:
        config["iterations"] = run.config.iterations  # over which the learning rate falls, or rises
    if update.replay_iterations and run.config.advantage.max_policy_lag is not None:
        config["max_policy_lag"] = run.config.advantage.max_policy_lag
    if teachers := run.config.score.teachers:
        config["teachers"] = {each.name: each.weight for each in teachers}
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config=config,
        inputs={reference: run.id_of(reference) or "" for reference in references},
        user_files={OWN: sha256_of(surrogate_file(run.imports, name))} if (name := update.own) else {},
    )


def policy_id(plan: Plan, weights: str) -> str:
    """Id of the policy that an update made: of what it depends on and of its weights, by their digest.

    Not of the inputs alone: where a rerun gives other bits, as a GPU may, what was made from it is stale.
    """
    return digest([plan.fingerprint(0), weights])


def resolved(update: UpdateConfig, *, on_gpu: bool, checkpointing: bool = False) -> UpdateConfig:
    """With what is computed in place of `auto`; checkpointing: what whoever asks found for it."""
    narrow = on_gpu or update.weights == "bfloat16_master"
    on = {"precision": "bfloat16" if narrow else "float32", "gradient_checkpointing": checkpointing}
    return update.model_copy(update={key: on[key] for key in on if getattr(update, key) == "auto"})


def reference_of(config: UpdateConfig, iteration: int) -> str:
    """The reference of the KL term in `iteration`, as an input: `reference`, or the policy it has become."""
    number = config.moved_reference(iteration)
    return f"policy@{number}" if number else "reference"


def require_reference(run: ActiveRun, iteration: int) -> None:
    """Raise InputError (exit 4) where the reference of `iteration` is a policy that can be had no more."""
    number = run.config.update.moved_reference(iteration)
    try:
        origin_of(run, number)
    except InputError as error:
        what = f"update.reference_every: policy {number} is the reference of iteration {iteration}"
        raise InputError(f"{what}; {error}") from None


def surrogate_file(folder: Path, name: str) -> Path:
    """The file in `folder` that holds `module:function`. Raises UsageError (exit 2) where there is none."""
    return named_file(folder, OWN, f"{name.partition(':')[0].replace('.', '/')}.py")


def iterations_of(run: ActiveRun, iteration: int) -> range:
    """The iterations whose rollouts the update of `iteration` trains on, earliest first."""
    return range(max(0, iteration - run.config.update.replay_iterations), iteration + 1)
