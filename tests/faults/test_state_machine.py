"""Whatever is done to a run, in whatever order: it is never silently wrong, and can always be completed."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import LONG, Tally, extent

pytestmark = [pytest.mark.slow, pytest.mark.sampled]
STAGES = ("generate", "score", "advantage", "update")
EXIT_CODES = {0, 2, 3, 4, 6, 7, 8}  # never 1, a bug of ours, nor a signal
CONFIGURATIONS: tuple[list[str], ...] = (
    [],
    ["--set", crash.NEW_REWARD],
    ["--set", "update.learning_rate=0.02"],
    ["--set", "advantage.scale=none"],
    ["--set", "generate.temperature=0.8"],
    ["--set", "checkpoints={every: 1, keep_last: 2}"],
)
configurations = st.sampled_from(CONFIGURATIONS)
iterations = st.integers(0, 3)


class Machine(RuleBasedStateMachine):
    """A project whose run anything may happen to. `project` is a copy that is not begun."""

    project: Path
    tally: Tally
    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.folder = crash.copy(self.project, self.home / "project")
        self.options: list[str] = []
        self.damaged: dict[Path, bytes | None] = {}  # what was left of the file; None: nothing
        self.forks = 0

    def teardown(self) -> None:
        """What is damaged is set aside, what is missing or stale done again: then all of it holds."""
        try:
            with self.tally.trial():
                self.complete()
        finally:
            shutil.rmtree(self.home)

    def complete(self) -> None:
        """Do what the commands say, and nothing else, until there is nothing left to do."""
        said = []
        for _ in range(40):
            code, found = self.verify("--discard")
            redo = [
                text for each in found["damaged"] for text in (each["redo"], advice(each["found"])) if text
            ]
            if not redo:
                assert code == 0, found
                code, err = self.do(["run", "--until", "2"])
                if code == 0:
                    break
                assert code == 4, err
                redo = [advice(err)]
            said.append(redo[0])
            self.do(redo[0].split()[1:] + (["--yes", "--until", "2"] if "--from" in redo[0] else []))
        assert code == 0, said
        assert self.verify()[0] == 0

    def verify(self, *options: str) -> tuple[int, dict[str, Any]]:
        code, out, err = crash.Child(self.folder, [["verify", "--json", *options, *self.options]]).wait()
        assert code in (0, 6), err
        assert out, err
        found: dict[str, Any] = json.loads(out)
        return code, found

    def do(self, command: list[str], fault: str | None = None) -> tuple[int, str]:
        code, err = crash.in_child(self.folder, [*command, *self.options], fault)
        assert "Traceback" not in err, err
        return code, err

    def expect(self, command: list[str]) -> int:
        code, err = self.do(command)
        assert code in EXIT_CODES, (command, code, err)
        if code == 6:
            assert self.damaged, err  # never without a cause
        return code

    @initialize()
    def begin(self) -> None:
        assert self.expect(["run", "--until", "1"]) == 0

    @rule(options=configurations)
    def edit_configuration(self, options: list[str]) -> None:
        self.options = options

    @rule(stage=st.sampled_from(STAGES), iteration=iterations, force=st.booleans())
    def stage(self, stage: str, iteration: int, force: bool) -> None:
        self.expect([stage, "--iteration", str(iteration), *(["--force"] if force else [])])

    @rule(until=st.integers(1, 3))
    def run(self, until: int) -> None:
        before = crash.contents(self.folder)
        self.expect(["run", "--until", str(until)])
        after = crash.contents(self.folder)
        replaced = {name for name in before if name in after and after[name] != before[name]}
        assert not replaced  # it never replaces a committed output
        gone = {name for name in before if name not in after}
        assert all(name.endswith(".safetensors") for name in gone)  # pruned

    @rule(iteration=iterations)
    def run_from(self, iteration: int) -> None:
        self.expect(["run", "--from", str(iteration), "--yes", "--until", "2"])

    @rule(
        command=st.sampled_from([["run", "--until", "3"], [*crash.FROM, "0", "--until", "1"], ["gc"]]),
        number=st.integers(1, 120),
    )
    def kill(self, command: list[str], number: int) -> None:
        code, err = self.do(command, f"kill:{number}")
        assert code in {*EXIT_CODES, -9}, err

    @rule(choice=st.integers(0, 10**6), delete=st.booleans())
    def damage(self, choice: int, delete: bool) -> None:
        root = self.folder / crash.RUN
        found = sorted(path for path in root.glob("iteration=*/*/*.parquet"))
        if not found:
            return
        path = found[choice % len(found)]
        if delete:
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[choice % len(content)] ^= 1 << (choice % 8)
            path.unlink()  # a hard link of a fork stays as it is
            path.write_bytes(content)
        self.damaged[path] = None if delete else bytes(content)

    @rule()
    def repair(self) -> None:
        code, err = self.do(["verify", "--discard"])
        assert code in (0, 6), err

    @rule()
    def gc(self) -> None:
        assert self.expect(["gc"]) in (0, 6)

    @rule(iteration=st.integers(0, 2))
    def fork(self, iteration: int) -> None:
        self.forks += 1
        name = f"fork{self.forks}"
        code = self.expect(["fork", "tiny", name, "--iteration", str(iteration)])
        assert (self.folder / "artifacts" / name).exists() == (code == 0)

    @rule()
    def sql(self) -> None:
        self.expect(["sql", "select count(*) from samples"])

    @invariant()
    def what_verify_finds_is_what_was_damaged(self) -> None:
        if not (self.folder / crash.RUN / "run.json").exists():
            return
        code, found = self.verify()
        assert code == 0 or self.damaged, found
        assert code == 6 or not any(self.is_damaged(path) for path in self.damaged), self.damaged
        if code == 0:
            self.damaged.clear()

    def is_damaged(self, path: Path) -> bool:
        """Whether a file is as the damage left it, and still of a committed output."""
        left = self.damaged[path]
        if left is not None:
            return path.exists() and path.read_bytes() == left
        manifest = path.parent / "manifest.json"
        return not path.exists() and manifest.exists() and path.name in manifest.read_text()


def advice(text: str) -> str:
    """The first command of ours that a message names; empty where it names none."""
    found = re.search("`(grpo [^`]*)`", text)
    return found[1] if found else ""


def test_whatever_happens_a_run_can_be_completed(
    write_project: Callable[[Path], Path], tmp_path: Path, new_tally: NewTally
) -> None:
    examples, steps = extent("rows of commands by chance"), extent("commands in such a row, at most")
    Machine.project = write_project(tmp_path / "project")
    Machine.tally = new_tally("commands, kills, damage, edits by chance", f"up to {steps} in a row")
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not LONG,
            suppress_health_check=list(HealthCheck),
        ),
    )
