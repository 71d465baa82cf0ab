"""config.named_files: files of the user's that a key of the configuration names."""

from pathlib import Path

from grpo.errors import UsageError


def named_file(folder: Path, key: str, name: str) -> Path:
    """The file `name` in the configuration's `folder`. Raises UsageError (exit 2) where it does not exist."""
    path = folder / name
    if not path.is_file():
        raise UsageError(f"{key}: {path}: no such file")
    return path


def named_text(folder: Path, key: str, name: str) -> str:
    """What the file holds, without a byte order mark.

    Raises UsageError (exit 2) where it does not exist, cannot be read or is not UTF-8.
    """
    path = named_file(folder, key, name)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{key}: {path}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{key}: {path}: {error.strerror}") from None
