"""Processes of the learner that do not come together: nothing of it is left in this one."""

from pathlib import Path
from typing import Any

import pytest
from tests.update.examples import configuration
from tests.update.runs import make_run
from torch import distributed

from grpo.config import ExecutionConfig
from grpo.errors import EngineError
from grpo.update.world import check_learner, together

pytestmark = pytest.mark.xdist_group("parallel")


def test_a_group_that_is_made_in_part_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, untied: Path
) -> None:
    def lose(*given: Any, **more: Any) -> None:
        assert distributed.is_initialized()
        raise RuntimeError("Connection closed by peer")

    execution = ExecutionConfig.model_validate({"learner": {"processes": 2}})
    config = configuration().model_copy(update={"execution": execution})
    run = make_run(tmp_path, config, untied, untied)
    monkeypatch.setattr(distributed, "new_group", lose)  # behind init_process_group()
    message = r"the processes do not reach each other \(Connection closed by peer\)"
    with pytest.raises(EngineError, match=message), together(run):
        pass
    assert not distributed.is_initialized()
    check_learner(run.config)  # and this process may try again
