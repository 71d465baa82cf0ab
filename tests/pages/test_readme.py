"""The README's commands and queries run, in order, on a short quickstart."""

import json
from pathlib import Path

import pytest
from tests.conftest import Grpo, copy_to_work_in
from tests.pages.pages import ROOT, Shell, texts


@pytest.mark.slow
def test_every_command_of_the_readme_runs(
    quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_to_work_in(quickstart, tmp_path, monkeypatch)
    shell = Shell()
    count = 0
    for console in texts((ROOT / "README.md").read_text(), "console"):
        for command, shown in shell.steps(console):
            count += 1
            code, out, err = shell.run(command)
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
def test_the_quickstart_learns(quickstart: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo) -> None:
    """Twelve of the sixty iterations: from 30 % right (as the starter is made) to well above half."""
    monkeypatch.chdir(quickstart)
    query = "select iteration, avg(reward) as reward from samples group by iteration order by iteration"
    code, out, err = grpo("sql", "--json", query)
    assert code == 0, err
    rewards = [row["reward"] for row in json.loads(out)]
    assert 0.2 < rewards[0] < 0.4
    assert rewards[4] > 0.6


def test_shipped_configuration_is_the_documented_one() -> None:
    from grpo.config import load

    config = load(ROOT / "pipeline.yaml")
    assert (config.run, config.iterations, config.model) == ("quickstart", 60, "tiny-arithmetic")
    assert config.generate.samples_per_prompt == 8
