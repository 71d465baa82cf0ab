"""The README's commands and queries run, in order, on a short quickstart."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pages.pages import ROOT, blocks, steps

pytestmark = pytest.mark.xdist_group("pages")  # one process, so that the quickstart runs once


@pytest.fixture(scope="module")
def folder(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished quickstart, for the README's commands to work on."""
    return Path(shutil.copytree(quickstart, tmp_path_factory.mktemp("readme") / "project"))


def _bash(folder: Path, script: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_every_command_of_the_readme_runs(folder: Path) -> None:
    settings = ""
    count = 0
    for block in blocks((ROOT / "README.md").read_text()):
        for command, shown in steps(block.text) if block.language == "console" else ():
            if re.match(r"[A-Z]+=", command):
                settings += f"{command}\n"
                continue
            count += 1
            code, out, err = _bash(folder, settings + command)
            if shown and shown[0].startswith("error:"):
                assert code == 4, (command, err)
                assert err == f"{shown[0]}\n", command
                continue
            assert code == 0, (command, err)
            if command.startswith("grpo sql") and shown:
                headers = [line.split() for line in out.splitlines() if line.strip()]
                assert headers[0] == shown[0].split(), command  # the same columns
                assert len(headers) > 2, f"{command}: no rows"
    assert count == 18


@pytest.mark.slow
def test_the_quickstart_learns(quickstart: Path) -> None:
    """Twelve of the sixty iterations: from 30 % right (as the starter is made) to well above half."""
    query = "select iteration, avg(reward) as reward from samples group by iteration order by iteration"
    code, out, err = _bash(quickstart, f'grpo sql --json "{query}"')
    assert code == 0, err
    rewards = [float(value) for value in re.findall(r'"reward": ([0-9.]+)', out)]
    assert 0.2 < rewards[0] < 0.4
    assert rewards[4] > 0.6


def test_shipped_configuration_is_the_documented_one() -> None:
    from grpo.config import load

    config = load(ROOT / "pipeline.yaml")
    assert (config.run, config.iterations, config.model) == ("quickstart", 60, "tiny-arithmetic")
    assert config.generate.samples_per_prompt == 8
