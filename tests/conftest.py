"""Shared fixtures: a tiny project folder, and the command line run in this process.

A project is what a user has: pipeline.yaml, prompts.jsonl, reward.py and a checkpoint (random weights, one
layer, a token is a byte), small enough that an iteration takes a fraction of a second.
"""

import gc
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from tests.faults import tally
from tests.faults.tally import LONG, Tally
from tests.forked import forked_workers

__all__ = ["forked_workers"]  # a fixture

Grpo = Callable[..., tuple[int, str, str]]  # (exit code, stdout, stderr) of a command line
NewTally = Callable[..., Tally]
Once = Callable[[str, Callable[[Path], object]], Path]

PIPELINE = """\
run: tiny
iterations: 2
seed: 0
model: ./model
prompts: {source: prompts.jsonl}
generate: {prompts_per_iteration: 3, samples_per_prompt: 2, max_new_tokens: 4, rollouts_per_shard: 4}
score:
  workers: 1
  rewards:
    - {function: "reward:code"}
update: {learning_rate: 0.01}
# Each policy on disk: what a test finds there must not depend on the time.
checkpoints: {every: 1, keep_last: 3, keep_every: 10}
"""
# Random responses: what a reward needs is to differ within a group.
REWARD = """\
def code(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""
PROMPTS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(6)]
# Four held-out prompts of three responses each; the reward above is a whole number from 0 to 6.
EVALUATE = """\
evaluate:
  prompts: {source: held_out.jsonl}
  every: 1
  samples_per_prompt: 3
  pass_threshold: 3.0
"""
HELD_OUT = [{"prompt": f"{n}+2=", "answer": str(n + 2)} for n in range(4)]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """once(name, build): a folder that build(folder) fills, for the first of all workers that asks for it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "shared"

    def made(name: str, build: Callable[[Path], object]) -> Path:
        shared.mkdir(exist_ok=True)
        folder, whole = shared / name, shared / f"{name}.whole"
        with FileLock(shared / f"{name}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                build(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights with the starter's tokenizer; Qwen3, as in starter_model.py."""
    import torch
    from tests.tiny import one_layer
    from transformers import GenerationConfig, Qwen3ForCausalLM

    from grpo.models import starter_model as starter

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = starter.build_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(one_layer(len(tokenizer), **special))
    model.generation_config = GenerationConfig(**special)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_syncs() -> Iterator[None]:
    """No test sees whether a sync was done, while a disk takes milliseconds for each of thousands."""
    with pytest.MonkeyPatch.context() as patch:
        if not LONG:  # a full disk may be found out by one
            patch.setattr(os, "fsync", os.fstat)  # which refuses what is no descriptor, too
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """For tensors this small, threads cost more time than they save."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def starter_model(once: Once) -> Path:
    """The starter model, and the lines said when it was trained, in a file beside it; read it only."""
    from grpo.models import starter_model as starter
    from grpo.models.find import STARTER

    def build(folder: Path) -> None:
        said: list[str] = []
        starter.ensure(folder / STARTER, said.append)
        (folder / "said").write_text("".join(f"{line}\n" for line in said))

    return once("starter", build) / STARTER


@pytest.fixture
def new_tally(record_property: Callable[[str, object], None]) -> NewTally:
    """new_tally(fault, where, of=None): a row of the table of faults."""

    def new(fault: str, where: str, of: int | None = None) -> Tally:
        return Tally(record_property, fault, where, of)

    return new


@pytest.fixture(scope="session")
def write_project(tiny_model: Path) -> Callable[[Path], Path]:
    """write_project(folder): make `folder` a project whose run is not begun."""

    def write(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        shutil.copytree(tiny_model, folder / "model")
        (folder / "pipeline.yaml").write_text(PIPELINE)
        (folder / "reward.py").write_text(REWARD)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        return folder

    return write


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """Run `grpo` with arguments in this process and folder."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    from grpo import cli

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["grpo", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
        # A command that ends with an error leaves them ignored. Only the main thread may set them.
        for number, handler in (
            handlers.items() if threading.current_thread() is threading.main_thread() else ()
        ):
            signal.signal(number, handler)
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def run_within(folder: Path, *arguments: str) -> str:
    """Run a command that succeeds in a folder; what it says on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, _, err = run_cli(*arguments)
    assert code == 0, err
    return err


def copy_to_work_in(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a project; the test runs in it."""
    folder = tmp_path / "project"
    shutil.copytree(source, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def grpo() -> Grpo:
    """grpo("run", "--json"): run a command in the present folder -> (exit code, stdout, stderr)."""
    return run_cli


@pytest.fixture(scope="session")
def complete(write_project: Callable[[Path], Path], once: Once) -> Path:
    """A project whose two iterations are done; read it only."""
    return once("complete", lambda folder: run_within(write_project(folder), "run"))


@pytest.fixture(scope="session")
def write_measured_project(write_project: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same with `evaluate`."""

    def write(folder: Path) -> Path:
        write_project(folder)
        with (folder / "pipeline.yaml").open("a") as file:
            file.write(EVALUATE)
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
        return folder

    return write


@pytest.fixture(scope="session")
def complete_and_measured(write_measured_project: Callable[[Path], Path], once: Once) -> Path:
    """A project whose two iterations are done and whose policies 0, 1 and 2 are measured; read it only."""
    return once("measured", lambda folder: run_within(write_measured_project(folder), "run"))


@pytest.fixture(scope="session")
def quickstart(starter_model: Path, once: Once) -> Path:
    """A folder with the shipped configuration, cut to twelve iterations, after `grpo run`; read it only."""

    def build(folder: Path) -> None:
        shutil.copytree(starter_model, folder / "artifacts" / ".models" / "tiny-arithmetic")
        shipped = (Path(__file__).parents[1] / "pipeline.yaml").read_text()
        (folder / "pipeline.yaml").write_text(shipped.replace("iterations: 60", "iterations: 12"))
        run_within(folder, "run")

    return once("quickstart", build)


@pytest.fixture
def measured_project(
    write_measured_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A project with `evaluate` of one's own, not begun; the test runs in it."""
    folder = write_measured_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def measured(complete_and_measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a project whose policies 0, 1 and 2 are measured; the test runs in it."""
    return copy_to_work_in(complete_and_measured, tmp_path, monkeypatch)


@pytest.fixture
def project(write_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one's own, not begun; the test runs in it."""
    folder = write_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def finished(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a project whose two iterations are done; the test runs in it."""
    return copy_to_work_in(complete, tmp_path, monkeypatch)


def pytest_collection_finish() -> None:
    """What is there by now stays: thousands of tests, which the collector need not look through again."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `long` are for `make test-long` alone."""
    if not LONG:
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the table of faults; `make test-long` writes it too."""
    reports = [
        report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])
    ]
    rows = tally.rows_of(reports)
    if rows:
        terminalreporter.section("faults")
        tally.print_table(rows, terminalreporter.write_line)
    if rows and LONG:
        tally.write_table(rows)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With GRPO_REQUIRE_ALL a skipped test is a failure: the gate must not pass by leaving things out."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("GRPO_REQUIRE_ALL") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
