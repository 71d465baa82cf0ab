"""Ragged rows in a file without a name."""

import os
from pathlib import Path

import numpy as np
import pytest

from grpo.update.scratch import LogprobStore, Ragged


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    rows = Ragged(tmp_path, np.int32)
    rows.extend(np.array([1, 2, 3]), np.array([2, 0, 1]))
    rows.extend(np.array([], dtype=np.int32), np.array([], dtype=np.int64))
    rows.extend(np.array([4, 5]), np.array([2]))
    assert [rows[i].tolist() for i in range(len(rows))] == [[1, 2], [], [3], [4, 5]]
    assert rows[0].dtype == np.int32
    rows.put(3, np.array([6, 7]))
    assert rows[3].tolist() == [6, 7]
    assert rows[2].tolist() == [3]
    assert list(tmp_path.iterdir()) == []


def test_reserved_rows_hold_zeros(tmp_path: Path) -> None:
    rows = Ragged(tmp_path, np.float32)
    rows.reserve(np.array([1, 2]))
    assert [rows[0].tolist(), rows[1].tolist()] == [[0], [0, 0]]


def test_a_store_is_a_mapping_of_what_was_put(tmp_path: Path) -> None:
    store = LogprobStore(tmp_path, np.array([2, 1, 3]))
    assert 1 not in store
    assert store.get(2) is None
    store[2] = np.array([-1.5, -2.5, -0.5])
    store.setdefault(2, np.zeros(3))
    store.setdefault(0, np.array([-1.0, -2.0]))
    assert {row: values.tolist() for row, values in store.items()} == {
        0: [-1.0, -2.0],
        2: [-1.5, -2.5, -0.5],
    }
    assert len(store) == 2
    del store[0]
    with pytest.raises(KeyError):
        store[0]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    values, lengths = np.zeros(2**20, dtype=np.float32), np.full(2**10, 2**10)
    rows = Ragged(tmp_path, np.float32)
    rows.extend(values, lengths)
    before = resident_mib()
    for _ in range(63):  # 252 MiB more
        rows.extend(values, lengths)
    assert sum(float(rows[i].sum()) for i in range(len(rows))) == 0
    assert resident_mib() - before < 32
