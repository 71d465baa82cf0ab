"""What docs/evaluation.md says to do works, and its configuration is one."""

import re
import shlex
from pathlib import Path

from tests.conftest import Grpo
from tests.pages.pages import DOCS, commands, texts

from grpo.config import EvaluateConfig, StopConfig
from grpo.config.yaml import parse

PAGE = (DOCS / "evaluation.md").read_text()


def test_its_configuration_is_one() -> None:
    text, stop = texts(PAGE, "yaml")
    assert StopConfig.model_validate(parse(stop)["stop"]).patience == 3
    section = parse(text)
    assert isinstance(section, dict)
    config = EvaluateConfig.model_validate(section["evaluate"])
    assert (config.every, config.samples_per_prompt, config.pass_reward) == (10, 8, "exact_answer")


def test_its_commands_run(measured: Path, grpo: Grpo) -> None:
    assert len(commands(PAGE)) == 4
    for command in commands(PAGE):
        # The policies of the page are 0 and 10, those of this run 0, 1 and 2.
        code, out, err = grpo(*shlex.split(re.sub(r"\b10\b", "1", command))[1:])
        assert (code, err) == (0, ""), command
        assert out.strip(), command
