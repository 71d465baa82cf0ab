"""find: the checkpoint that a name in the configuration stands for."""

from pathlib import Path

from grpo.artifacts import ActiveRun, Run

STARTER = "tiny-arithmetic"


def resolve_model(run: ActiveRun, name: str) -> Path:
    """The local directory of a checkpoint; the starter model is trained when it is first asked for."""
    if name == STARTER:
        folder = starter_folder(run)
        if not folder.exists():  # the folder appears complete; training it imports torch
            from grpo.models import starter_model

            starter_model.ensure(folder, run.console.say)
        return folder
    return run.checkpoint_path(name)


def starter_folder(run: Run) -> Path:
    """Where the starter model is, once it is trained: all runs share it."""
    return run.root / ".models" / STARTER
