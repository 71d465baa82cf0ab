"""stdin, stdout and stderr that are closed, full, or gone: one line and a code for every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GRPO = f"{sys.executable} -m grpo"
# Everything that prints to stdout.
COMMANDS = (
    "status",
    "status --json",
    "sql 'select * from range(20000)'",
    "sql 'select * from range(20000)' --json",
    "sql 'select * from range(20000)' --csv",
    "sql 'select * from samples'",
    "show --no-pager",
    "show --json",
    "compare code reward",
    "verify",
    "gc",
    "run --dry-run",
    "--help",
    "--version",
    "sql --help",
    "--show-completion bash",
)


def shell(command: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_that_cannot_be_written_is_exit_7_and_one_line(complete: Path, command: str) -> None:
    for where, what in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        code, out, err = shell(f"{GRPO} {command} {where}", complete)
        assert (code, out) == (7, ""), err
        message = f"stdout: cannot be written: {what}"
        last = err.splitlines()[-1]
        assert (json.loads(last)["error"] if "--json" in command else last.removeprefix("error: ")) == message
        assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_goes_away_is_no_error(complete: Path, command: str) -> None:
    code, out, err = shell(f"{GRPO} {command} | head -1; exit ${{PIPESTATUS[0]}}", complete)
    assert code == 0, err
    assert len(out.splitlines()) <= 1
    assert "error" not in err
    assert "Exception" not in err


def test_stderr_that_cannot_be_written(complete: Path) -> None:
    for where, code in (("2>/dev/full", 2), ("2>&-", 2), (">/dev/full 2>&1", 2)):
        assert shell(f"{GRPO} sql nope {where}", complete) == (code, "", "")
    for where in ("2>/dev/full", "2>&-", "<&- 2>&-"):  # nothing is said
        code, out, _ = shell(f"{GRPO} sql 'select 1 as one' --json {where}", complete)
        assert (code, json.loads(out)) == (0, [{"one": 1}])


@pytest.mark.slow
def test_a_run_without_streams(project: Path) -> None:
    assert shell(f"{GRPO} run --until 1 <&- >&- 2>&-", project) == (0, "", "")
    assert shell(f"{GRPO} run --until 2 2>/dev/full", project) == (7, "", "")  # its log cannot be written
    assert shell(f"{GRPO} run 2>&-", project) == (0, "", "")
    assert shell(f"{GRPO} verify 2>&-", project)[0] == 0


def test_a_query_comes_from_stdin_where_that_is_no_terminal(complete: Path) -> None:
    assert shell(f"echo 'select 1 as one;' | {GRPO} sql --json", complete) == (
        0,
        '[\n {\n  "one": 1\n }\n]\n',
        "",
    )
    assert shell(f"printf 'select 1\\nas one' | {GRPO} sql --csv", complete) == (0, '"one"\n1\n', "")
    for query in (f"{GRPO} sql < /dev/null", f"{GRPO} sql <&-", f"echo | {GRPO} sql"):
        code, out, err = shell(query, complete)
        assert (code, out, err) == (2, "", "error: query: gives no rows; write a select\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_any_encoding_shows_any_text(complete: Path, encoding: str) -> None:
    for command in ("status", "--help", "sql \"select 'é€\\ud83d' as x\"", "show --no-pager", "nope"):
        done = subprocess.run(
            ["bash", "-c", f"{GRPO} {command}"],
            cwd=complete,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert done.returncode in (0, 2), done.stderr
        assert b"Traceback" not in done.stderr


def test_at_a_terminal_a_query_over_its_limit_ends_and_the_prompt_goes_on(complete: Path) -> None:
    import pty
    import time

    main, terminal = pty.openpty()
    with subprocess.Popen(
        [*GRPO.split(), "sql", "--timeout-s", "2"],
        cwd=complete,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        lines = (
            "select count(*) from range(100000000000) a, range(1000) b;",
            "nope",
            "select 40 + 2 as x",
            "exit",
        )
        os.write(main, "".join(f"{line}\n" for line in lines).encode())
        shown = b""
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            try:
                shown += os.read(main, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(10) == 0
    text = shown.decode()
    stopped = text.index("query: stopped after its limit of 2 s; give --timeout-s more")
    refused = text.index("query: Parser Error", stopped)
    assert " 42" in text[refused:]
