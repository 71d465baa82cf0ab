"""config.named_files: the configuration, and the files of the user's that its keys name."""

from pathlib import Path

from grpo.errors import UsageError


def named_file(folder: Path, key: str, name: str) -> Path:
    """The file `name` in the configuration's `folder`. Raises UsageError (exit 2) where it does not exist."""
    path = folder / name
    if not path.is_file():
        raise UsageError(f"{key}: {path}: no such file")
    return path


def named_text(folder: Path, key: str, name: str) -> str:
    """What the file holds; errors as read_text()'s."""
    return read_text(folder / name, f"{key}: {folder / name}")


def read_text(path: Path, place: str, advice: str = "") -> str:
    """A text file of the user's, with or without a byte order mark.

    place, advice: how a message begins, and how one of a missing file ends. Raises UsageError (exit 2).
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{place}: no such file{advice}") from None
    except UnicodeDecodeError as error:
        lines = error.object[: error.start].split(b"\n")
        place = f"{place}:{len(lines)}:{len(lines[-1]) + 1}"
        raise UsageError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{place}: cannot be read: {error.strerror}") from None
