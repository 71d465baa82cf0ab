"""config.named_files: the configuration, and the files of the user's that its keys name."""

from pathlib import Path

from grpo.errors import UsageError


def named_file(folder: Path, key: str, name: str) -> Path:
    """The file `name` in the configuration's `folder`. Raises UsageError (exit 2) where it does not exist."""
    path = folder / name
    if problem := not_a_file(path):
        raise UsageError(f"{key}: {path}: {problem}")
    return path


def not_a_file(path: Path) -> str | None:
    """Why what a user named cannot be read as a file; None: it can. A pipe would be waited for."""
    kinds = {"a folder": Path.is_dir, "a pipe": Path.is_fifo, "a socket": Path.is_socket}
    if path.is_file():
        return None
    if not path.exists():
        return "no such file"
    return f"is {next((kind for kind, holds in kinds.items() if holds(path)), 'a device')}; a file is needed"


def named_text(folder: Path, key: str, name: str) -> str:
    """What the file holds. Raises UsageError (exit 2) where it cannot be read as UTF-8."""
    return read_text(folder / name, f"{key}: {folder / name}")


def read_text(path: Path, place: str, advice: str = "") -> str:
    """A text file of the user's, with or without a byte order mark.

    place, advice: how a message begins, and how one of a missing file ends. Raises UsageError (exit 2).
    """
    try:
        if path.exists() and (problem := not_a_file(path)):
            raise UsageError(f"{place}: {problem}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{place}: no such file{advice}") from None
    except UnicodeDecodeError as error:
        lines = error.object[: error.start].split(b"\n")
        place = f"{place}:{len(lines)}:{len(lines[-1]) + 1}"
        raise UsageError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{place}: cannot be read: {error.strerror}") from None
