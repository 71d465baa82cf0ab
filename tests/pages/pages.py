"""pages: a page of documentation -> its blocks, the commands in them, its links.

Blocks are fenced with ```. The first word of the line that opens one is its language; title="reward.py" makes
it the content of a file, title="benchmarks/objectives.txt" of a text the quotation of one.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tests.conftest import run_cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; title: empty where it has none."""

    language: str
    title: str
    text: str


def blocks(text: str) -> list[Block]:
    return [Block(*found.groups(default="")) for found in _BLOCK.finditer(text)]


def texts(page: str, language: str) -> list[str]:
    """The blocks of one language."""
    return [block.text for block in blocks(page) if block.language == language]


def commands(page: str) -> list[str]:
    """What the console blocks of a page run."""
    return [command for console in texts(page, "console") for command, _ in steps(console)]


class Shell:
    """Runs the commands of a page in the present folder, with the variables that it sets."""

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}

    def steps(self, console: str) -> Iterator[tuple[str, list[str]]]:
        """The steps of a console block but for those that set a variable."""
        for line, shown in steps(console):
            if setting := re.fullmatch(r"([A-Z]+)='(.*)'", line):
                self.variables[setting[1]] = setting[2]
            else:
                yield line, shown

    def run(self, command: str, *more: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); `grpo` runs in this process, which spares seconds of imports."""
        if command.startswith("grpo "):
            words = shlex.split(command, comments=True)[1:]
            return run_cli(*(Template(word).safe_substitute(self.variables) for word in words), *more)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, **self.variables, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


def num_fences(text: str) -> int:
    return len(_FENCE.findall(text))


def steps(console: str) -> list[tuple[str, list[str]]]:
    """A console block as (command, lines it prints); a command goes on while a quote is open."""
    found: list[tuple[str, list[str]]] = []
    for line in console.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found[-1][0].count('"') % 2:
            found[-1] = (f"{found[-1][0]}\n{line}", [])
        else:
            found[-1][1].append(line)
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures, addresses of other sites left out."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}
