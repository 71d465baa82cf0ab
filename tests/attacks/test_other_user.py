"""The run of another user: what may be read is read, and what may not is exit 7, never damage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import Grpo

from grpo.artifacts import read_manifest
from grpo.artifacts.existing import find_run
from grpo.artifacts.manifest import _parsed
from grpo.errors import ResourceError

NOBODY = 65534
RUN = Path("artifacts/tiny")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextmanager
def nobody() -> Iterator[None]:
    """Within, files are opened with the rights of a user who owns none."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def readable(finished: Path) -> Path:
    """A finished run that everybody may read; modules that a command needs are imported."""
    finished.chmod(0o755)
    for path in finished.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return finished


def test_what_may_be_read_is_read_and_writing_is_exit_7(readable: Path, grpo: Grpo) -> None:
    for command in ("status", "verify", "gc", "run"):
        assert grpo(command)[0] == 0  # and all that it imports is there
        with nobody():
            code, _, err = grpo(command)
        if command in ("status", "verify"):
            assert (command, code, err) == (command, 0, "")
        elif command == "gc":
            assert code == 7
            assert "artifacts/tiny" in err
            assert "Permission denied" in err
            assert err.count("\n") == 1


def test_what_may_not_be_read_is_no_damage(readable: Path, grpo: Grpo) -> None:
    grpo("verify")
    output = RUN / "iteration=000001/rollouts"
    for path in (output / "manifest.json", next(output.glob("*.parquet")), RUN / "run.json", RUN):
        path.chmod(0o600)
        _parsed.cache_clear()
        with nobody():
            code, out, err = grpo("verify")
        path.chmod(0o755 if path.is_dir() else 0o644)
        assert (code, out) == (7, ""), path
        assert str(path.parent) in err
        assert "Permission denied" in err
    (output / "manifest.json").chmod(0o600)
    _parsed.cache_clear()
    with nobody(), pytest.raises(ResourceError):
        read_manifest(output)
    RUN.chmod(0o700)
    with nobody(), pytest.raises(ResourceError, match="ask its owner"):
        find_run("tiny")
