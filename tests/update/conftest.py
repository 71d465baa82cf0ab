"""Checkpoints, each made once."""

from pathlib import Path

import pytest
from tests.update.examples import save_checkpoint


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "untied")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tied", tied=True)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that is not the policy."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which gradient checkpointing would switch on."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "still", dropout=0.0)
