"""driver: the mirror of a run while a command works on it: a thread copies.

What fails there is raised at the next border, or at the end of the command; what is committed here stays, and
the next command copies it.
"""

import os
import queue
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from grpo.artifacts import ActiveRun, files, read_sealed, seal
from grpo.artifacts.layout import CHECKPOINT
from grpo.artifacts.lease import CLOCK, Lease, new_epoch
from grpo.errors import CorruptError, GrpoError, ResourceError
from grpo.mirror.layout import Place
from grpo.mirror.lease import lease_of
from grpo.mirror.store import Store
from grpo.mirror.upload import Upload

_NOTE = ".mirror.json"
_LEASE_PATIENCE_S = 8.0  # of one renewal: there are several before the lease lapses
_LOOK_S = 0.1  # how often a signal is looked for


@contextmanager
def mirrored(run: ActiveRun, removed_too: bool, again: Collection[Place] = ()) -> Iterator[None]:
    """Copy to the run's mirror all that is committed before and in a `with` block; needs the run's lock.

    removed_too: what is no longer in the run goes there too, where the block succeeds; checkpoints always do.
    again: outputs whose copies are damaged, to be copied once more. Raises ResourceError (exit 7) where the
    store cannot be reached, LockedError (5) where another command writes there, InputError (4) where it holds
    another run.
    """
    copying = _Copying(run, again)
    try:
        run.mirror = copying
        try:
            yield
        except GrpoError:  # which is said; what was committed before is copied all the same
            if not run.console.is_urgent:
                with suppress(GrpoError):
                    copying.finish(removed_too=False)
            raise
        copying.finish(removed_too)
    finally:
        run.mirror = None
        copying.close()


class _Copying:
    """The mirror that a run tells of its commits."""

    def __init__(self, run: ActiveRun, again: Collection[Place]) -> None:
        self._run = run
        run.refuse_links(files_too=True)  # what one leads to is not the run's to copy
        address = str(run.config.artifacts.mirror)
        note, epoch = _Note(run, address), new_epoch()
        store, self._lease = opened(address, run.path.name, epoch)
        note.write(note.epochs, [*note.tried, epoch])  # before it is taken: a crash may come between
        console, own = run.console, {*note.epochs, *note.tried}
        last = self._lease.take(lambda holder: holder.epoch in own, console.say, console.stop_requested)
        try:
            self._upload = Upload(run, store, self._lease)
            if last not in note.epochs:  # somebody else may have written what is there
                self._upload.require_own(again)
            self._upload.forget(again)
            behind = self._upload.behind()
            note.write([epoch], [])  # last: what fails before leaves the lease to whom it belonged
        except GrpoError:
            with suppress(GrpoError):
                self._lease.release(last)
            raise
        self._failure: GrpoError | None = None
        self._whole = False  # until all has been copied
        self._is_ending = False  # once nothing more is to come
        self._due: queue.SimpleQueue[Place | bool] = queue.SimpleQueue()
        self._is_closed = False
        if behind and self._upload.held.manifests:
            run.console.say(f"mirror: {len(behind)} outputs behind; they are copied first")
        for place in behind:
            self._due.put(place)
        # A daemon: a second signal ends the command without waiting for what is under way.
        self._copier = threading.Thread(target=self._copy, name="mirror", daemon=True)
        self._copier.start()
        self._lease.keep(self._fail)

    def committed(self, output: str, iteration: int | None) -> None:
        """Copy an output that has just been committed."""
        self._due.put((output, iteration))

    def check(self) -> None:
        """Raise what failed: LockedError (exit 5), ResourceError (exit 7) or CorruptError (exit 6)."""
        if self._failure is not None:
            raise self._failure
        assert self._is_ending or self._copier.is_alive(), "the thread that copies has ended before its time"

    def finish(self, removed_too: bool) -> None:
        """Return when all is copied. Raises as check()."""
        self.check()
        if num := self._due.qsize():
            self._run.console.say(f"mirror: copying what is left ({num})")
        self._is_ending = True
        self._due.put(removed_too)
        while self._copier.is_alive():
            self._copier.join(_LOOK_S)
        self.check()
        assert self._whole, "the thread that copies has ended before its time"

    def close(self) -> None:
        """End the threads, as far as they can be, and let the next command have the lease."""
        self._is_closed = True
        self._lease.end()
        if not self._copier.is_alive():
            with suppress(GrpoError):  # it lapses
                self._lease.release()

    def _copy(self) -> None:
        try:
            while not isinstance(due := self._due.get(), bool):
                if self._failure is not None or self._is_closed:
                    return
                self._upload.copy(due)
                if due[0] == CHECKPOINT:
                    self._upload.drop_checkpoints()
            if self._failure is None:
                self._upload.finish(due)
                self._whole = True
        except GrpoError as error:
            self._fail(error)
        except OSError as error:  # of a file here
            self._fail(ResourceError(f"mirror: {error.filename}: {error.strerror}"))

    def _fail(self, error: GrpoError) -> None:
        self._failure = self._failure or error


class _Note:
    """`.mirror.json` of a run: epochs in which this folder was the one that wrote the mirror at an address.

    A mirror whose last epoch is among them holds what this run was, and nothing else. A copy of the folder
    is another one. tried: of commands that ended before that was certain.
    """

    def __init__(self, run: ActiveRun, address: str) -> None:
        self._path = run.path / _NOTE
        folder = f"{socket.gethostname()}:{os.path.realpath(run.path)} ({run.path.stat().st_ino})"
        self._of = {"address": address, "folder": folder}
        self.epochs: list[str] = []
        self.tried: list[str] = []
        if self._path.exists():
            try:
                held = read_sealed(self._path, address=str, folder=str, epochs=list)
            except CorruptError as error:
                way = "remove it, and the mirror is compared with the run"
                raise CorruptError(f"{error}; {way}") from None
            if self._of.items() <= held.items():
                self.epochs, self.tried = held["epochs"], held.get("tried", [])

    def write(self, epochs: list[str], tried: list[str]) -> None:
        """Note them, in the place of those before."""
        files.write_file(self._path, seal({**self._of, "epochs": epochs, "tried": tried}))
        files.sync_folder(self._path.parent)


def opened(address: str, run: str, epoch: str) -> tuple[Store, Lease]:
    """The store of a mirror, and the lease of a run in it, which is not taken yet."""
    return Store(address), lease_of(Store(address, _LEASE_PATIENCE_S), run, epoch, CLOCK)
