"""meeting: two commands that exchange words, by files of a folder that both see. The first one leads."""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from grpo.artifacts import files
from grpo.artifacts.lease import new_epoch, this_kernel
from grpo.errors import GrpoError, ResourceError, UsageError

PATIENCE_S = 30.0
HOW = "start two at the same time: srun -N2 -n2 grpo doctor --shared"
_LOOK_S = 0.01


class Meeting:
    """One of the two, once the other one is there.

    Raises ResourceError (exit 7) where none comes, and where one that was there says nothing more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files.make_folder(folder)
        token, place = new_epoch(), folder / "first"
        self.is_first = files.create_file(place, token.encode())
        self._silent = ""
        left = f"a command that was killed has left it, and it is removed; {HOW}"
        with ExitStack() as undo:
            undo.callback(self.close)
            self._token = token if self.is_first else self._wait(place.read_text, left)
            undo.pop_all()
        own = {"host": socket.gethostname(), "pid": os.getpid(), "kernel": this_kernel()}
        if not self.is_first and not files.create_file(self._path(True, "hello"), json.dumps(own).encode()):
            raise UsageError(f"{folder}: two are here already; {HOW}")
        with ExitStack() as undo:
            undo.callback(self.close)
            none = f"no second one has come in {PATIENCE_S:.0f} s; {HOW}"
            other = self.hear("hello", none if self.is_first else left)
            undo.pop_all()
        if self.is_first:
            self.tell("hello", **own)
        self.machines = f"{own['host']} and {other['host']}"
        self.is_alone = own["kernel"] == other["kernel"]

    def tell(self, word: str, **content: Any) -> None:
        """Say something that the other one hears."""
        try:
            files.write_file(self._path(True, word), json.dumps(content).encode())
        except FileNotFoundError:
            raise self._ended() from None

    def hear(self, word: str, why: str = "") -> Any:
        """What the other one said; ResourceError (exit 7) where it says nothing. why: for the message."""
        path = self._path(False, word)
        return json.loads(self._wait(path.read_text, why or f"the other one does not say `{word}`"))

    def has_said(self, word: str) -> bool:
        """Whether the other one has."""
        return self._path(False, word).exists()

    def place(self, name: str) -> Path:
        """A file to try something with."""
        return self.folder / f"{self._token}-{name}"

    def _path(self, own: bool, word: str) -> Path:
        return self.place(f"{'first' if own == self.is_first else 'second'}-{word}")

    def _wait(self, look: Callable[[], str], why: str) -> str:
        started = time.monotonic()
        while not self._silent and time.monotonic() - started < PATIENCE_S:
            with suppress(FileNotFoundError):
                if found := look():
                    return found
            if not self.folder.exists():
                raise self._ended()
            time.sleep(_LOOK_S)
        self._silent = self._silent or why  # it is not waited for a second time
        raise ResourceError(f"{self.folder}: {self._silent}")

    def close(self) -> None:
        """Remove the folder."""
        with suppress(GrpoError, OSError):  # the other one may be writing there still
            files.remove(self.folder)

    def _ended(self) -> ResourceError:
        return ResourceError(f"{self.folder}: the other one has ended; what it says is why")
