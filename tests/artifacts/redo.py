"""redo: a run whose manifests say that its updates can be done again, and that some policies are on disk.

Nothing was trained: where a policy is to be had from is read from manifests alone.
"""

from pathlib import Path
from typing import Any

from grpo.artifacts import (
    ADAPTER,
    CHECKPOINT,
    OPTIMIZER,
    POLICY,
    ActiveRun,
    FileRecord,
    Manifest,
    Plan,
    Product,
    Run,
    Staging,
    files,
    id_of,
)
from grpo.config import Config
from grpo.console import Console

CONFIG: dict[str, Any] = {
    "run": "r",
    "model": "m",
    "prompts": {"source": "arithmetic"},
    "score": {"rewards": [{"function": "exact_answer"}]},
}
FILES = {POLICY: "model.safetensors", ADAPTER: "adapter.safetensors", OPTIMIZER: "optimizer.safetensors"}
EXECUTION = {"device": "cpu", "threads": 1, "determinism": "exact"}


def empty_run(folder: Path, **changes: Any) -> ActiveRun:
    """A run in `folder`, with nothing in it yet; of one that is there, the same under a new configuration."""
    config = Config.model_validate({**CONFIG, **changes})
    run = ActiveRun(folder / "artifacts", config, folder, Console(quiet=True))
    files.make_folder(run.path)
    return run


def commit_start(run: Run) -> None:
    """Policy 0."""
    start = Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0)
    start.commit(Product({"policy": "P0", "reference": "P0"}, [], {}))


def commit_update(run: Run, iteration: int, advantages: str = "A") -> Manifest:
    """The update that makes policy iteration + 1, and the advantages it reads; its id is of what they are."""
    made = Staging(run, Plan("advantage", 1, "advantages", iteration, {}, {}), 0)
    made.commit(Product({"advantages": advantages}, [], {}))
    references = [f"policy@{iteration}", f"advantages@{iteration}"]
    inputs = {reference: run.id_of(reference) or "" for reference in references}
    staging = Staging(run, Plan("update", 1, "update", iteration, {}, inputs), 0)
    ids = {"policy": f"P{iteration + 1}{advantages}"}
    return staging.commit(Product(ids, [], {"weights": f"W{iteration}"}, EXECUTION))


def commit_checkpoint(run: Run, policy: int, parts: tuple[str, ...] = (POLICY, OPTIMIZER)) -> Manifest:
    """A policy from 1 on, on disk."""
    reference = f"policy@{policy}"
    plan = Plan(CHECKPOINT, 1, CHECKPOINT, policy - 1, {}, {reference: run.id_of(reference) or ""})
    staging = Staging(run, plan, 0)
    held: list[FileRecord] = [staging.write_bytes(part, FILES[part], b"%d" % policy) for part in parts]
    return staging.commit(Product({CHECKPOINT: id_of(held)}, held, {}))


def trained(folder: Path, num_updates: int, on_disk: list[int], **changes: Any) -> ActiveRun:
    """A run of so many updates, with the policies `on_disk`."""
    run = empty_run(folder, **changes)
    commit_start(run)
    for iteration in range(num_updates):
        commit_update(run, iteration)
    for policy in on_disk:
        commit_checkpoint(run, policy)
    return run
