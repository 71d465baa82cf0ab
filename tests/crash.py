"""crash: commands of `grpo` in processes of their own that end badly, and what a run holds afterwards."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import run_cli

from grpo.artifacts.faults import VARIABLE

RUN = Path("artifacts/tiny")
LONG = bool(os.environ.get("GRPO_LONG"))  # `make test-long`: every point, not a selection
NEW_REWARD = "score.rewards=[{function: 'reward:length'}]"
# Name -> (whether it starts from a finished run, the command).
SCENARIOS: dict[str, tuple[bool, list[str]]] = {
    "run": (False, ["run"]),
    "from": (True, ["run", "--from", "1", "--set", NEW_REWARD]),
    "score": (True, ["score", "--iteration", "0-1", "--force"]),
    "gc": (True, ["gc"]),
    "fork": (True, ["fork", "tiny", "other", "--iteration", "1"]),
}


def points(count: int, every: int) -> list[int]:
    """Numbers from 1 to count: each `every`-th, or all of them in the long test."""
    return list(range(1, count + 1, 1 if LONG else every))


def in_child(folder: Path, command: list[str], fault: str | None = None) -> tuple[int, str]:
    """(exit status or minus the signal, stderr) of a command in a fork of this process: quick to start."""
    log = folder / "stderr.txt"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        if fault is not None:
            os.environ[VARIABLE] = fault
        code = 99
        try:
            code, _, err = run_cli(*command)
            log.write_text(err)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    err = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), err


@dataclass(frozen=True)
class Operation:
    """A change on disk: its kind, of what, to what (rename, link), asked for where, and what it synced."""

    kind: str
    path: str
    other: str | None
    place: str
    content: bytes | None


def recorded(folder: Path, command: list[str]) -> list[Operation]:
    """The operations of a command that nothing disturbs."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "operations"
        code, err = in_child(folder, command, f"record:{log}")
        assert code == 0, err
        return [
            Operation(*json.loads(line), content=found.read_bytes() if found.exists() else None)
            for number, line in enumerate(log.read_text().splitlines(), 1)
            if (found := Path(f"{log}.{number}")) is not None
        ]


def copy(source: Path, target: Path) -> Path:
    """A copy of a project, without what an earlier copy left there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every table, weight, optimiser state and probe that the runs of a project have committed."""
    root = folder / "artifacts"
    found = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        counts = path.suffix in (".parquet", ".safetensors") or path.name == "probe.json"
        if counts and not any(part.startswith(".") for part in parts):
            found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary files anywhere, and staged files, of the run."""
    root = folder / RUN
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.suffix == ".tmp" and path.is_file()
    )
