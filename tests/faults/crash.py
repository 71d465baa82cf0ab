"""crash: commands of `grpo` in processes of their own that end badly, and what a run holds afterwards."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from gc import freeze
from pathlib import Path

# What is not used here is imported so that a fork has it already: that is half the seconds of a command.
import duckdb  # noqa: F401
import pyarrow.dataset  # noqa: F401
import rich.console  # noqa: F401
from tests import forked
from tests.conftest import run_cli
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

import grpo.advantage.stage
import grpo.cli
import grpo.generate.engines.transformers_engine
import grpo.generate.stage
import grpo.inspect.status
import grpo.manage.fork
import grpo.manage.gc
import grpo.manage.verify
import grpo.pipeline.prepare
import grpo.pipeline.runner
import grpo.pipeline.work
import grpo.score.stage
import grpo.update.stage  # noqa: F401
from grpo.artifacts.faults import VARIABLE

RUN = Path("artifacts/tiny")
NEW_REWARD = "score.rewards=[{function: 'reward:length'}]"
EVALUATE = "evaluate={prompts: {source: prompts.jsonl}, samples_per_prompt: 2}"
ROUNDS = "generate.dynamic_sampling={min_groups: 5, max_rounds: 3}"  # the tiny project takes all three
KEEP_2 = "checkpoints={every: 1, keep_last: 2}"


@dataclass(frozen=True)
class Scenario:
    """A command that something happens to. before: commands on a finished project; None: nothing is begun."""

    command: list[str]
    before: list[list[str]] | None
    then: list[str] | None = None
    """What completes it; None: the command again."""

    @property
    def resume(self) -> list[str]:
        """What completes it."""
        return self.then or self.command


FROM = ["run", "--yes", "--from"]
SCENARIOS = {
    "run": Scenario(["run", "--until", "1"], None),
    "next": Scenario(["run", "--until", "3", "--set", KEEP_2], []),
    "from": Scenario([*FROM, "1", "--set", NEW_REWARD], [], ["run", "--set", NEW_REWARD]),
    "score": Scenario(["score", "--iteration", "0-1", "--force"], []),
    "gc": Scenario(["gc", "--set", KEEP_2], [["run", "--until", "3"], [*FROM, "2", "--set", NEW_REWARD]]),
    "evaluate": Scenario(["evaluate", "--policy", "1", "--set", EVALUATE], []),
    "fork": Scenario(["fork", "tiny", "other", "--iteration", "1"], []),
    # With a trash that is there already, and a later iteration to move.
    "from 0": Scenario(
        [*FROM, "0", "--set", NEW_REWARD],
        [["advantage", "--iteration", "0", "--force"]],
        ["run", "--set", NEW_REWARD],
    ),
    "rounds": Scenario(["run", "--until", "1", "--set", ROUNDS], None),
    # Policies between are rebuilt; what was written goes as the next is.
    "every 3": Scenario(["run", "--until", "5", "--set", "checkpoints={every: 3, keep_last: 1}"], None),
    # Two iterations are sampled before the first is trained on.
    "lag": Scenario(["run", "--until", "3", "--set", "generate.policy_lag=1"], None),
    "prune": Scenario(["run", "--until", "3", "--set", KEEP_2], None),
}


def begun(scenario: str, write_project: Callable[[Path], Path], complete: Path, folder: Path) -> Path:
    """The project before the command of a scenario, in `folder`."""
    before = SCENARIOS[scenario].before
    if before is None:
        return write_project(folder)
    copy(complete, folder)
    for command in before:
        succeed(folder, *command)
    return folder


class Child:
    """Commands, one after the other, in a fork of this process: quick to start. again: for ever."""

    def __init__(
        self,
        folder: Path,
        commands: list[list[str]],
        fault: str | None = None,
        again: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = tempfile.TemporaryDirectory()
        forked.begin()
        self.pid = os.fork()
        if self.pid == 0:
            freeze()  # what is garbage here may have had threads, which a fork has not: its end would abort
            code = 99
            try:
                os.chdir(folder)
                os.environ.update(environment or {})
                if fault is not None:
                    os.environ[VARIABLE] = fault
                for command in itertools.cycle(commands) if again else commands:
                    code, out, err = run_cli(*command)
                    Path(self._log.name, "out").write_text(out)
                    Path(self._log.name, "err").write_text(err)
                    if code != 0:
                        break
            except BaseException:  # noqa: BLE001 - shown by wait()
                Path(self._log.name, "err").write_text(traceback.format_exc())
            finally:
                os._exit(code)

    def kill(self) -> None:
        """End it by SIGKILL, if it has not ended."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, str, str]:
        """(exit status or minus the signal, stdout, stderr) of the last command that ended."""
        _, status = os.waitpid(self.pid, 0)
        texts = [path.read_text() if path.exists() else "" for path in self._files()]
        self._log.cleanup()
        return os.waitstatus_to_exitcode(status), texts[0], texts[1]

    def _files(self) -> list[Path]:
        return [Path(self._log.name, name) for name in ("out", "err")]


def in_child(folder: Path, command: list[str], fault: str | None = None) -> tuple[int, str]:
    """(exit status or minus the signal, stderr) of a command."""
    code, _, err = Child(folder, [command], fault).wait()
    return code, err


def succeed(folder: Path, *command: str) -> str:
    """Stdout of a command that nothing disturbs."""
    return succeed_all(folder, [list(command)])


def succeed_all(folder: Path, commands: list[list[str]]) -> str:
    """Stdout of the last of several commands."""
    code, out, err = Child(folder, commands).wait()
    assert code == 0, (commands, code, err)
    return out


@dataclass(frozen=True)
class Operation:
    """A change on disk: its kind, of what, to what (rename, link), asked for where, and what it synced."""

    kind: str
    path: str
    other: str | None
    place: str
    content: bytes | None

    @property
    def sync(self) -> str:
        """What is made durable and where that is asked for; empty for what is no sync."""
        return f"{self.kind} of {self.place}" if self.kind.startswith("fsync") else ""


def recorded(folder: Path, command: list[str]) -> list[Operation]:
    """The operations of a command that nothing disturbs."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "operations"
        code, err = in_child(folder, command, f"record:{log}")
        assert code == 0, err
        operations = []
        for number, line in enumerate(log.read_text().splitlines(), 1):
            synced = Path(f"{log}.{number}")
            content = synced.read_bytes() if synced.exists() else None
            kind, path, other, place = json.loads(line)
            operations.append(Operation(kind, path, other, place, content))
        return operations


def copy(source: Path, target: Path) -> Path:
    """A copy of a project, without what an earlier copy left there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every table, weight, optimiser state and weight check that the runs of a project hold."""
    return {plain(name): digest(folder, name) for name in _held(folder / "artifacts")}


def plain(name: str) -> str:
    """The name of a file without the fingerprint of the attempt that made it."""
    return re.sub(r"-[0-9a-f]{8}\.parquet$", ".parquet", name)


def committed(folder: Path) -> dict[str, int]:
    """Inode of each of those files whose output has its manifest."""
    root = folder / "artifacts"
    outputs = {path.parent for path in root.rglob("manifest.json")}
    return {name: (root / name).stat().st_ino for name in _held(root) if outputs & set((root / name).parents)}


def inodes(folder: Path, name: str) -> set[int]:
    """Inode of one of them, and of those of its name that are staged or in the trash of the same run."""
    run = folder / "artifacts" / Path(name).parts[0]
    return {path.stat().st_ino for path in run.rglob(Path(name).name)}


def digest(folder: Path, name: str) -> str:
    """sha256 of one of them."""
    return hashlib.sha256((folder / "artifacts" / name).read_bytes()).hexdigest()


def _held(root: Path) -> list[str]:
    names = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        counts = path.suffix in (".parquet", ".safetensors") or path.name == "weight_check.json"
        if counts and not any(part.startswith(".") for part in relative.parts):
            names.append(str(relative))
    return names


def finished_shards(folder: Path) -> dict[str, int]:
    """Inode of each shard that is committed, by a sidecar or with its output: never to be made again."""
    shards = [
        Path(str(path).removesuffix(".sidecar.json"))
        for output in ("rollouts", "rewards", "evaluation")  # update starts its tables again with its steps
        for path in folder.rglob(f"{output}-*/*.sidecar.json")
    ]
    found = {path.name: path.stat().st_ino for path in shards}
    kept = {Path(name).name: inode for name, inode in committed(folder).items()}
    return found | {
        name: inode for name, inode in kept.items() if "part-" in name or name.startswith("eval_")
    }


def usage(child: Child) -> tuple[float, int] | None:
    """(MiB of memory, open files) of a child now; None once it has ended."""
    place = Path("/proc") / str(child.pid)
    with suppress(FileNotFoundError, PermissionError, IndexError):
        pages = int((place / "statm").read_text().split()[1])
        if pages:  # none is left to a child that has ended and was not waited for
            return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list((place / "fd").iterdir()))
    return None


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def leftovers(folder: Path) -> list[str]:
    """Temporary files of the run, but for those in the trash."""
    names = [str(path.relative_to(folder / RUN)) for path in (folder / RUN).rglob("*.tmp") if path.is_file()]
    return sorted(name for name in names if not name.startswith(".trash/"))
