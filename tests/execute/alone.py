"""alone: a run that one process made, to hold against the same run made elsewhere."""

from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.faults import crash

MORE = ("--set", "generate.prompts_per_iteration=6", "--set", "generate.rollouts_per_shard=2")


def contents(folder: Path) -> dict[str, str]:
    """What a run holds, without its name."""
    return {name.partition("/")[2]: digest for name, digest in crash.contents(folder).items()}


@pytest.fixture
def alone(project: Path, grpo: Grpo) -> dict[str, str]:
    """Of a run with MORE in one process; its folder is gone."""
    code, _, err = grpo("run", *MORE)
    assert code == 0, err
    found = contents(project)
    (project / "artifacts").rename(project.parent / "alone")
    return found
