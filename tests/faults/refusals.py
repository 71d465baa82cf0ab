"""refusals: a bad input and a command; what the user is told, and what the runs hold afterwards."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PIPELINE, Grpo

from grpo.console import printable

RUN = ("run", "--until", "1")
RUN_ON = ("run", "--set", "iterations=3")  # of a project whose two iterations are done
STARTED = ("policy", "prompts", "run.json")  # what a run stands on, committed before its first stage


@dataclass(frozen=True)
class Case:
    """`message` is a piece of the line; `commits` names the outputs that the command may leave behind."""

    input: str
    spoil: Callable[[], object]
    command: Sequence[str]
    code: int
    message: str
    commits: Sequence[str] = ()


def check(grpo: Grpo, case: Case) -> None:
    """Spoil the project that is the present folder, run the command, and look. With -s: print the outcome."""
    case.spoil()
    before = committed()
    code, out, err = grpo(*case.command)
    *progress, line = err.splitlines() or [""]
    message = line.removeprefix("error: ").replace(f"{Path.cwd()}/", "")
    print(printable(f"\n{case.input[:80]} | {message[:400]} | {code}"))
    assert (code, out) == (case.code, ""), err
    assert line.startswith("error: ")
    assert case.message in line
    # Lines of progress may come first, and nothing else: no second error, no traceback.
    assert not [text for text in progress if text.startswith(("error", "Traceback", " "))], err
    after = committed()
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert {output_of(path) for path in changed} == set(case.commits)


def committed() -> dict[Path, str]:
    """sha256 of every file that counts: not the lock, staging and trash, whose names begin with a dot."""
    found = {}
    for path in Path("artifacts").rglob("*") if Path("artifacts").is_dir() else ():
        # sources/: copies of the user's files, which are no output.
        if path.is_file() and not any(part.startswith(".") or part == "sources" for part in path.parts):
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def output_of(path: Path) -> str:
    """`rollouts` of artifacts/tiny/iteration=000000/rollouts/manifest.json."""
    part, *below = path.parts[2:]
    return below[0] if part.startswith("iteration=") else part


def write(name: str, content: str | bytes) -> Callable[[], object]:
    """Write a file of the project."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda: Path(name).write_bytes(data)


def configure(*changes: tuple[str, str]) -> Callable[[], object]:
    """Replace texts of the fixture's pipeline.yaml."""
    text = PIPELINE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return write("pipeline.yaml", text)


def nothing() -> None:
    """For a mistake that is on the command line."""


def loop(name: str) -> Callable[[], object]:
    """Put a link to itself in place of a file, or where none is."""

    def spoil() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(Path(name).name)

    return spoil


def folder(name: str) -> Callable[[], object]:
    """Put a folder in place of a file."""

    def spoil() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir(parents=True)

    return spoil
