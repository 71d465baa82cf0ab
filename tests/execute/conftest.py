"""Workers as the product starts them: they are what is tested here."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def forked_workers() -> None:
    """In place of the forks that the other folders have."""
