"""Files that several processes write, and what happens where they do not see the same store."""

import hashlib
import platform
import re
from pathlib import Path

import pytest

from grpo.artifacts import apart, take_over, write_apart
from grpo.errors import ResourceError


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "SEEN_S", 0.2)


def test_a_file_has_its_name_once_it_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    record = write_apart(tmp_path, "policy", "a.bin", "try1", [b"ab", memoryview(b"c")])
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["a.bin.try1"]
    assert (record.name, record.part, record.bytes) == ("a.bin", "policy", 3)
    assert record.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert write_apart(tmp_path, "policy", "a.bin", "try0", b"of a try before") != record
    take_over(tmp_path, record, "try1")
    assert (tmp_path / "policy" / "a.bin").read_bytes() == b"abc"
    assert (tmp_path / "policy" / "a.bin.try0").exists()


@pytest.mark.usefixtures("impatient")
def test_processes_that_see_other_stores_are_told(tmp_path: Path) -> None:
    said = f"is not seen on {platform.node()} as it was written elsewhere; artifacts have to be on a store"
    with pytest.raises(ResourceError, match=f"^{re.escape(str(tmp_path / 'policy'))}: {re.escape(said)}"):
        write_apart(tmp_path, "policy", "a.bin", "try1", b"abc")
    (tmp_path / "policy").mkdir()
    record = write_apart(tmp_path, "policy", "a.bin", "try1", b"abc")
    (tmp_path / "policy" / "a.bin.try1").write_bytes(b"ab")
    with pytest.raises(ResourceError, match=re.escape(f"a.bin.try1: {said}")):
        take_over(tmp_path, record, "try1")
    assert not (tmp_path / "policy" / "a.bin").exists()
