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
    """What the file holds. Raises UsageError (exit 2) where it does not exist or is not UTF-8."""
    path = named_file(folder, key, name)
    return read_text(path, f"{key}: {path}")


def read_text(path: Path, place: str) -> str:
    """A text file of the user's, with or without a byte order mark.

    place: how a message begins. Raises UsageError (exit 2) where it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror}") from None
