"""artifacts.policies: where each policy of a run can be had from: its checkpoint, or a replay of updates.

Rollouts, advantages and manifests are a redo log: a policy is durable (policy 0, or with a checkpoint),
replayable from a durable one before it, or gone, where what an update between them read is another now.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from grpo.artifacts.layout import CHECKPOINT
from grpo.artifacts.manifest import MANIFEST, Manifest
from grpo.artifacts.run import Run
from grpo.errors import CorruptError, InputError

_WAY_OUT = "`grpo verify --discard` moves it away, and the policy is rebuilt"
POLICY, OPTIMIZER, ADAPTER = "policy", "optimizer", "adapter"
"""Parts of a checkpoint: a whole model, or what LoRA trained, and the optimiser state."""


@dataclass(frozen=True)
class Origin:
    """What a policy is rebuilt from: the nearest durable one, and how many updates lie between."""

    policy: int
    durable: int

    @property
    def updates(self) -> int:
        """Of those; 0 where it is durable itself."""
        return self.policy - self.durable


def durable_policies(run: Run) -> list[int]:
    """Policies that are on disk, in order; policy 0 always is."""
    have = [number for number in run.iterations() if (run.folder(CHECKPOINT, number) / MANIFEST).exists()]
    return [0, *(number + 1 for number in have if is_durable(run, number + 1))]


def is_durable(run: Run, policy: int) -> bool:
    """Whether a policy is on disk: one that its update would not give now does not count."""
    return policy == 0 or checkpoint_of(run, policy) is not None


def checkpoint_of(run: Run, policy: int) -> Manifest | None:
    """The checkpoint of a policy from 1 on. Raises CorruptError (exit 6) where its manifest is damaged."""
    reference = f"policy@{policy}"
    try:
        found, id_ = run.manifest(CHECKPOINT, policy - 1), run.id_of(reference)
    except CorruptError as error:
        raise CorruptError(f"{error}; {_WAY_OUT}") from None
    return found if found is not None and id_ is not None and found.inputs.get(reference) == id_ else None


def origin_of(run: Run, policy: int, without: Collection[int] = ()) -> Origin:
    """What a policy can be rebuilt from. Raises InputError (exit 4) where it is gone, saying why.

    without: policies that are not to be taken from disk, such as those whose checkpoint is damaged.
    """
    number = policy
    while number in without or not _is_whole(run, number):
        update = run.require("update", number - 1, f"grpo update --iteration {number - 1}")
        if why := cannot_replay(run, update):
            raise InputError(
                f"policy {policy} is not on disk, and cannot be rebuilt: update {number - 1} {why};"
                f" `grpo run --from {number - 1}` makes another"
            )
        number -= 1
    return Origin(policy, number)


def same_weights_since(run: Run, policy: int) -> int:
    """The first policy that has the weights of this one: some updates move none."""
    while policy:
        update = run.manifest("update", policy - 1)
        if update is None or update.summary["moved"]:
            break
        policy -= 1
    return policy


def newest_policy(run: Run) -> int:
    """The newest policy that was made, and not lost with its update; 0 before the first."""
    return next((n + 1 for n in reversed(run.iterations()) if run.manifest("update", n) is not None), 0)


def can_be_had(run: Run, policy: int) -> bool:
    """Whether a policy is on disk or can be rebuilt; one that was never made cannot."""
    try:
        origin_of(run, policy)
    except InputError:
        return False
    return True


def held_part(run: Run, policy: int, part: str) -> Path | None:
    """The folder of a part of the checkpoint of a policy from 1 on, verified; None: not on disk.

    Raises CorruptError (exit 6) where it is damaged.
    """
    manifest = checkpoint_of(run, policy)
    held = [file for file in manifest.files if file.part == part] if manifest is not None else []
    try:
        for file in held:
            run.verify(file, run.path_of(file, CHECKPOINT, policy - 1))
    except (CorruptError, FileNotFoundError) as error:
        if checkpoint_of(run, policy) is None:  # a command that works on the run has dropped it meanwhile
            return None
        raise CorruptError(f"{error}; {_WAY_OUT}") from None
    return run.folder(CHECKPOINT, policy - 1) / part if held else None


def _is_whole(run: Run, policy: int) -> bool:
    try:
        return is_durable(run, policy)
    except CorruptError:  # `grpo verify` says so; the policy itself follows from the tables
        return False


def cannot_replay(run: Run, update: Manifest) -> str:
    """Why an update cannot be done again as it was; empty: it can."""
    if not update.execution or "weights" not in update.summary:
        return "has no record of its execution (an older grpo made it)"
    for reference, id_ in update.inputs.items():
        if run.id_of(reference) != id_:
            return f"was made from another {reference} than the one that is there"
    return ""
