"""artifacts.checkpoint: a Hugging Face checkpoint directory as files: which belong to it, and its id."""

import os
from pathlib import Path

from grpo.artifacts.files import sha256_of
from grpo.artifacts.manifest import digest
from grpo.config.named_files import not_a_file
from grpo.errors import InputError, UsageError, first_line

_BELONGS = {
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
}  # weights, configuration, tokenizer, template
_OURS = {"weight_check.json", "trainer_state.json"}


def is_weight_file(name: str) -> bool:
    """Whether a file of a checkpoint holds weights, or says which file holds which."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint, by name. InputError (exit 4) for what is none, or no weights."""
    require_checkpoint(folder)
    found = [path for path in folder.iterdir() if path.suffix in _BELONGS and path.name not in _OURS]
    if not any(is_weight_file(path.name) for path in found):
        raise InputError(f"{folder}: holds no .safetensors weights; pickled weights and GGUF are never read")
    for path in found:
        _check_link(folder, path)
        if path.exists() and not path.is_dir() and (problem := not_a_file(path)):
            raise InputError(f"{path}: {problem}")
    return sorted(path for path in found if path.is_file())


def require_checkpoint(folder: Path, others: str = "") -> None:
    """Raise InputError (exit 4) unless it is a directory, neither a peft adapter nor of GGUF alone.

    An adapter beside weights too: transformers then loads its base. others: what else may stand there.
    """
    paths = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    ggufs = [path for path in paths if path.suffix.lower() == ".gguf"]
    if ggufs and not any(is_weight_file(path.name) for path in paths):
        way = "take the checkpoint that it was made from, or convert it as examples/capitals/model.py does"
        raise InputError(f"{min(ggufs)}: GGUF is not read; {way}")
    if not folder.is_dir():
        problem = "is no directory" if folder.exists() else "no such directory"
        raise InputError(f"{folder}: {problem}; a Hugging Face checkpoint directory is needed{others}")
    if (folder / "adapter_config.json").is_file():
        way = "merge it first (`merge_and_unload`, `save_pretrained`)"
        raise InputError(f"{folder}: is a peft adapter (adapter_config.json), no whole model: {way}")


def _check_link(folder: Path, path: Path) -> None:
    """Raise InputError (exit 4) for a link out of the folder: a run and an export copy what it leads to.

    Those of the hub's cache lead from snapshots/<revision>/ to blobs/ beside it.
    """
    if not path.is_symlink():
        return
    inside, target = folder.resolve(), Path(os.path.realpath(path))  # resolve() fails on one in a circle
    blobs = [inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else []
    if not any(target.is_relative_to(place) for place in (inside, *blobs)):
        raise InputError(
            f"{path}: is a link that leads out of the checkpoint's folder; put the file in its place"
        )


def checkpoint_id(folder: Path) -> str:
    """Id of the policy in `folder`: a digest of its files' content in the order of their names."""
    return digest([sha256_of(path) for path in checkpoint_files(folder)])


def is_hub_id(name: str, folder: Path) -> bool:
    """Whether a configured checkpoint is a hub id, `owner/name`, and not a path relative to `folder`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not (folder / name).exists()


def local_checkpoint(name: str, folder: Path) -> Path:
    """The directory that a path relative to `folder` names, without the `..` that change nothing."""
    path = folder / Path(name).expanduser()
    plain = Path(os.path.normpath(path))
    return plain if not path.exists() or (plain.exists() and plain.samefile(path)) else path


def find_checkpoint(name: str, folder: Path, revision: str | None = None) -> Path:
    """The local directory of a checkpoint: a path relative to `folder`, or a hub id, downloaded once.

    revision: branch, tag or commit on the hub; None: the newest. Raises InputError (exit 4) when the name is
    neither, UsageError (exit 2) for a revision of a directory.
    """
    path = local_checkpoint(name, folder)
    if not is_hub_id(name, folder):
        if revision is not None:
            raise UsageError(f"model_options.revision: {revision}, but {name} is no hub id; leave it out")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [f"*{suffix}" for suffix in sorted(_BELONGS)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = first_line(error)
        name = name if revision is None else f"{name} at revision {revision}"
        raise InputError(f"{name}: no directory {path}, and not to be had from the hub: {why}") from None
