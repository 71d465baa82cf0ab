"""Chat templates that others wrote: one that never ends, or takes all memory, is exit 3; SIGTERM is heard."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import Grpo

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def settings(project: Path, template: str, place: str) -> list[str]:
    """A project whose chats meet `template`: of the configuration, or in its checkpoint."""
    if place == "checkpoint":
        (project / "model" / "chat_template.jinja").write_text(template)
        return ["--set", "prompts.chat=true"]
    (project / "own.jinja").write_text(template)
    return ["--set", "prompts.chat=true", "--set", "prompts.chat_template=own.jinja"]


@pytest.mark.parametrize("place", ["checkpoint", "configuration"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 3000000000 }}", "it takes more than 2 GiB of memory"),
        ("{% for a in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe"),
    ],
)
def test_it_is_refused(project: Path, grpo: Grpo, template: str, reason: str, place: str) -> None:
    arguments = settings(project, template, place)
    code, _, err = grpo("run", *arguments)
    message = f"error: prompts: the chat template cannot render prompt 0: {reason}"
    assert (code, message in err, "Traceback" in err) == (3, True, False), err


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_sigterm_ends_a_command_that_waits_for_one_that_never_ends(project: Path, command: str) -> None:
    arguments = settings(project, LOOP, "checkpoint")
    start = [sys.executable, "-c", "from grpo.cli import main; main()", command, *arguments]
    process = subprocess.Popen(start, cwd=project, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 60
        while not (children := _children(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - sent < 8  # before the template's own limit of 10 s
        assert process.returncode in (143, -signal.SIGTERM)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        process.kill()


def _children(pid: int) -> list[int]:
    """Processes of Python that were started by it."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return list(map(int, found.stdout.split()))
