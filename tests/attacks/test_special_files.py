"""A pipe, a socket or a device where a file is named: one line at once, and nobody waits."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo

PIPE = "is a pipe; a file is needed"
JUDGE = "{name: j, judge: {url: 'http://127.0.0.1:9', model: m, rubric: pipe.md}}"
NAMED: dict[str, tuple[list[str], int, str]] = {
    "configuration": (["run", "-c", "pipe.yaml"], 2, f"pipe.yaml: {PIPE}"),
    "configuration: a device": (["run", "-c", "/dev/null"], 2, "/dev/null: is a device; a file is needed"),
    "configuration: endless": (["doctor", "-c", "/dev/zero"], 2, "/dev/zero: is a device; a file is needed"),
    "configuration: a socket": (["run", "-c", "socket"], 2, "socket: is a socket; a file is needed"),
    "prompts.jsonl": (["run", "--set", "prompts.source=pipe.jsonl"], 3, f"pipe.jsonl: {PIPE}"),
    "prompts.csv": (["run", "--set", "prompts.source=pipe.csv"], 3, f"pipe.csv: {PIPE}"),
    "prompts.parquet": (["doctor", "--set", "prompts.source=pipe.parquet"], 3, f"pipe.parquet: {PIPE}"),
    "held-out": (["run", "--set", "evaluate.prompts.source=pipe.jsonl"], 3, f"pipe.jsonl: {PIPE}"),
    "template": (
        ["run", "--set", "prompts.chat=true", "--set", "prompts.chat_template=pipe.jinja"],
        2,
        f"pipe.jinja: {PIPE}",
    ),
    "prompts_sql": (["run", "--set", "generate.prompts_sql=pipe.sql"], 2, f"pipe.sql: {PIPE}"),
    "advantage.sql": (["run", "--set", "advantage.sql=pipe.sql"], 2, f"pipe.sql: {PIPE}"),
    "surrogate": (["run", "--set", "update.surrogate=pipe:own"], 2, f"pipe.py: {PIPE}"),
    "reward": (["run", "--set", "score.rewards=[{function: 'pipe:own'}]"], 2, "no module file pipe.py in"),
    "rubric": (["run", "--set", f"score.rewards=[{JUDGE}]"], 2, f"pipe.md: {PIPE}"),
    "a checkpoint's template": (["run"], 4, f"model/chat_template.jinja: {PIPE}"),
    "a checkpoint's configuration": (["run"], 4, f"model/generation_config.json: {PIPE}"),
}


@pytest.fixture
def in_time() -> Iterator[None]:
    """What waits for ever fails instead."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.usefixtures("in_time")
def test_it_is_refused(project: Path, grpo: Grpo, what: str) -> None:
    arguments, code, message = NAMED[what]
    name = message.partition(": ")[0]
    if what == "reward":
        name = "pipe.py"
    if name == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    elif not name.startswith("/dev"):
        Path(name).unlink(missing_ok=True)
        os.mkfifo(name)
    found, _, err = grpo(*arguments)
    if arguments[0] == "doctor" and not err:
        assert found == code  # its table says why
        return
    assert (found, message in err, "Traceback" in err) == (code, True, False), err
