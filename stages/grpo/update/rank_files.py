"""rank_files: a checkpoint that all processes of a group write between them, and rank 0 commits.

They gather together, then each writes its own files in a thread, beside whatever comes next. Rank 0 has
their records when they meet again; what one of them could not write all of them raise then.
"""

import secrets
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.artifacts import OPTIMIZER, FileRecord, Staging, Writer, files, take_over, write_apart
from grpo.update.collective import collective
from grpo.update.own_files import OwnFile, own_files

if TYPE_CHECKING:
    from grpo.update.learner import Learner


class Together:
    """Begun where it is made, on rank 0."""

    def __init__(self, learner: "Learner", staging: Staging, start: Path, part: str, file_bytes: int) -> None:
        self.staging, self._learner = staging, learner
        self._mark = secrets.token_hex(8)
        for place in (part, OPTIMIZER):
            files.make_folder(staging.folder / place)
        _begin(learner, start, staging.folder.absolute(), self._mark, file_bytes)

    def finish(self) -> tuple[list[FileRecord], float]:
        """The records of all files, and the seconds that the slowest took; all are named as they will be.

        Raises ResourceError (exit 7), in all processes, where one of them could not write its own.
        """
        found = _finish(self._learner)
        records = [record for each, _ in found for record in each]
        for record in records:
            take_over(self.staging.folder, record, self._mark)
        return records, max(seconds for _, seconds in found)


class Writing:
    """What this process writes, in a thread of its own."""

    def __init__(self, own: list[OwnFile], folder: Path, mark: str, began: float) -> None:
        self.records: list[FileRecord] = []
        self.seconds, self._began = 0.0, began
        self._writer = Writer()
        self._writer.start(partial(self._write, own, folder, mark))

    def wait(self) -> None:
        """Until it is written. Raises ResourceError (exit 7) where it could not be."""
        try:
            self._writer.wait()
        finally:
            self._writer.close()

    def _write(self, own: list[OwnFile], folder: Path, mark: str) -> None:
        while own:  # what is written is held no longer
            part, name, content = own.pop(0)
            self.records.append(write_apart(folder, part, name, mark, content))
        self.seconds = time.monotonic() - self._began


@collective
def _begin(learner: "Learner", start: Path, folder: Path, mark: str, file_bytes: int) -> None:
    began = time.monotonic()
    learner.writing = Writing(own_files(learner, start, file_bytes), folder, mark, began)


@collective
def _finish(learner: "Learner") -> list[tuple[list[FileRecord], float]]:
    """Of each process."""
    writing, ranks = learner.writing, learner.ranks
    assert writing is not None
    assert ranks is not None
    learner.writing = None
    try:
        writing.wait()
    finally:  # also of one that failed: the others wait for it
        found = ranks.to_all((writing.records, writing.seconds), patiently=True)
    return found
