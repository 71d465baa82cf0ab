"""scratch: rows of different lengths in an unnamed file, so that memory does not grow with the rollouts.

The file is on the disk of the run, has no name, and is gone when its process is, however that ends. It is
read and written at offsets, not mapped: a mapped page counts as this process's memory.
"""

import os
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from grpo.artifacts import files


class Ragged:
    """A sequence of arrays of one type, appended many at a time. In memory: where each of them ends."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self._folder = folder
        self._ends = np.zeros(1, dtype=np.int64)  # the first row begins where nothing ends: at 0
        with files.resource_errors(folder):
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (lives as long as self)

    def extend(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Append rows of `lengths`, one behind another in `values`."""
        assert len(values) == lengths.sum()
        start = int(self._ends[-1])
        self._ends = np.concatenate([self._ends, start + np.cumsum(lengths, dtype=np.int64)])
        self._write(start, values)

    def reserve(self, lengths: np.ndarray) -> None:
        """Append rows of `lengths` that hold 0 until they are put."""
        self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths, dtype=np.int64)])
        with files.resource_errors(self._folder):
            os.ftruncate(self._file.fileno(), int(self._ends[-1]) * self.dtype.itemsize)

    def put(self, row: int, values: np.ndarray) -> None:
        """Overwrite one row."""
        start, end = self._ends[row : row + 2].tolist()
        assert len(values) == end - start
        self._write(start, values)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = self._ends[row : row + 2].tolist()
        size = self.dtype.itemsize
        content = os.pread(self._file.fileno(), (end - start) * size, start * size)
        return np.frombuffer(content, dtype=self.dtype)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def _write(self, start: int, values: np.ndarray) -> None:
        content = memoryview(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        offset = start * self.dtype.itemsize
        with files.resource_errors(self._folder):
            while content:
                written = os.pwrite(self._file.fileno(), content, offset)
                content, offset = content[written:], offset + written


class LogprobStore(MutableMapping[int, np.ndarray]):
    """float32 log-probs by row of Rollouts, of the rows that were read so far."""

    def __init__(self, folder: Path, num_tokens: np.ndarray) -> None:
        self._rows = Ragged(folder, np.float32)
        self._rows.reserve(num_tokens)
        self._held = np.zeros(len(num_tokens), dtype=bool)

    def __setitem__(self, row: int, values: np.ndarray) -> None:
        self._rows.put(row, values)
        self._held[row] = True

    def __getitem__(self, row: int) -> np.ndarray:
        if not self._held[row]:
            raise KeyError(row)
        return self._rows[row]

    def __delitem__(self, row: int) -> None:
        self._held[row] = False

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._held).tolist())

    def __len__(self) -> int:
        return int(self._held.sum())
