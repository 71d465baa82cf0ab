"""Checkpoints, each made once."""

from pathlib import Path

import pytest
from tests.update.examples import save_checkpoint, save_layer_norm_checkpoint


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


@pytest.fixture(scope="session")
def in_layer_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose norms stay in float64, unlike RMSNorm as transformers has it."""
    return save_layer_norm_checkpoint(tmp_path_factory.mktemp("model") / "layer_norm")
