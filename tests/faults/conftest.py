"""Fixtures of the tests that break things: the projects they start from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Once
from tests.faults import crash


@pytest.fixture
def start(scenario: str, write_project: Callable[[Path], Path], complete: Path, once: Once) -> Path:
    """The project before the command of `scenario`; read it only."""
    return once(f"start of {scenario}", lambda folder: crash.begun(scenario, write_project, complete, folder))
