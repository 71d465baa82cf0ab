"""Fixtures of the tests that break things: the projects they start from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults import crash


@pytest.fixture
def start(scenario: str, write_project: Callable[[Path], Path], complete: Path, tmp_path: Path) -> Path:
    """The project before the command of `scenario`."""
    return crash.begun(scenario, write_project, complete, tmp_path / "start")
