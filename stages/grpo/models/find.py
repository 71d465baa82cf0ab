"""find: the checkpoint that a name in the configuration stands for."""

from pathlib import Path

from grpo.artifacts import ActiveRun, Run

STARTER = "tiny-arithmetic"
TEACHER = "small-arithmetic"  # a larger one that knows the sums, for examples/distil.yaml


def resolve_model(run: ActiveRun, name: str) -> Path:
    """The local directory of a checkpoint; a starter model is trained when it is first asked for."""
    folder = model_path(run, name)
    if name in (STARTER, TEACHER) and not folder.exists():  # it appears complete; training it imports torch
        from grpo.models import starter_model

        starter_model.ensure(folder, run.console.say)
    return folder


def model_path(run: ActiveRun, name: str) -> Path:
    """The same, without training anything."""
    return starter_folder(run, name) if name in (STARTER, TEACHER) else run.checkpoint_path(name)


def starter_folder(run: Run, name: str = STARTER) -> Path:
    """Where a starter model is, once it is trained: all runs share it."""
    return run.root / ".models" / name
