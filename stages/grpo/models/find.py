"""find: the checkpoint that a name in the configuration stands for."""

from pathlib import Path

from grpo.artifacts import ActiveRun, Run
from grpo.errors import InputError, UsageError

STARTER = "tiny-arithmetic"


def resolve_model(run: ActiveRun, name: str) -> Path:
    """The local directory of a checkpoint; the starter model is trained when it is first asked for."""
    if name == STARTER:
        if name == run.config.model and (revision := run.config.model_options.revision) is not None:
            raise UsageError(f"model_options.revision: {revision}, but {name} is no hub id; leave it out")
        folder = starter_folder(run)
        if not folder.exists():  # the folder appears complete; training it imports torch
            from grpo.models import starter_model

            starter_model.ensure(folder, run.console.say)
        return folder
    return run.checkpoint_path(name)


def configured_model(run: ActiveRun, key: str, name: str) -> Path:
    """The same of the checkpoint that `key` names; InputError (exit 4) says what may stand there."""
    try:
        folder = resolve_model(run, name)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if not folder.is_dir():
        raise InputError(
            f"{key}: {folder}: no such directory; a Hugging Face checkpoint directory is needed, or a hub id"
            f" (owner/name), or `{STARTER}`, the built-in starter model"
        )
    return folder


def starter_folder(run: Run) -> Path:
    """Where the starter model is, once it is trained: all runs share it."""
    return run.root / ".models" / STARTER
