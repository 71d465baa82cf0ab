"""find: the checkpoint that a name in the configuration stands for."""

from pathlib import Path

from grpo.artifacts import ActiveRun, Run, is_hub_id, require_checkpoint
from grpo.errors import InputError, UsageError

STARTER = "tiny-arithmetic"
TEACHER = "small-arithmetic"  # a larger one that knows the sums, for examples/distil.yaml
BUILT_IN = (STARTER, TEACHER)


def resolve_model(run: ActiveRun, name: str) -> Path:
    """The local directory of a checkpoint; a starter model is trained when it is first asked for."""
    folder = model_path(run, name)
    if name in BUILT_IN:
        _check_revision(run, name)
        if not folder.exists():  # it appears complete; training it imports torch
            from grpo.models import starter_model

            starter_model.ensure(folder, run.console.say, run.console.stop_requested)
    return folder


def configured_model(run: ActiveRun, key: str, name: str) -> Path:
    """The same of the checkpoint that `key` names; InputError (exit 4) says what may stand there."""
    try:
        folder = resolve_model(run, name)
        require_checkpoint(folder, f", or a hub id (owner/name), or `{STARTER}`, the built-in starter model")
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    return folder


def model_path(run: ActiveRun, name: str) -> Path:
    """As resolve_model(), without training anything."""
    return starter_folder(run, name) if name in BUILT_IN else run.checkpoint_path(name)


def local_model(run: ActiveRun, name: str) -> Path | None:
    """The directory of a checkpoint, where it need not be; None where it would be trained or downloaded."""
    if name in BUILT_IN:
        _check_revision(run, name)
        return starter_folder(run, name) if starter_folder(run, name).exists() else None
    if not is_hub_id(name, run.imports):
        return run.checkpoint_path(name)
    from huggingface_hub import try_to_load_from_cache

    revision = run.config.model_options.revision if name == run.config.model else None
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def starter_folder(run: Run, name: str = STARTER) -> Path:
    """Where a starter model is, once it is trained: all runs share it."""
    return run.root / ".models" / name


def _check_revision(run: ActiveRun, name: str) -> None:
    """Raise UsageError (exit 2) for a revision of a starter model."""
    if name == run.config.model and (revision := run.config.model_options.revision) is not None:
        raise UsageError(f"model_options.revision: {revision}, but {name} is no hub id; leave it out")
