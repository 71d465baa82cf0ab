"""errors: what a user can do something about.

A GrpoError is one line: where, what was found, what would be right. `main()` in cli/entry.py ends with it.
"""


class GrpoError(Exception):
    """A fault with a one-line message for the user; `exit_code` is the exit status of the command."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int) -> None:
        cls.exit_code = exit_code

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: what to do stands in the message, not in the calls that led there."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(GrpoError, exit_code=2):
    """The configuration or the command line is wrong."""


class DataError(GrpoError, exit_code=3):
    """The user's data, or what a model produced, cannot be used."""


class InputError(GrpoError, exit_code=4):
    """Something a stage reads is missing, stale, or differs from what is configured."""


class LockedError(GrpoError, exit_code=5):
    """Another process works on the run."""


class CorruptError(GrpoError, exit_code=6):
    """A committed file is not what its manifest says."""


class ResourceError(GrpoError, exit_code=7):
    """The machine has not enough of something (disk, memory)."""


class EngineError(GrpoError, exit_code=8):
    """The engine, the learner or a reward failed while it worked."""


class UnsupportedModelError(EngineError, exit_code=4):
    """The engine cannot sample from a model of this kind."""


class Interrupted(GrpoError, exit_code=130):
    """The user asked to stop; what is committed stays. SIGINT exits 130, SIGTERM 143, SIGHUP 129."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted: what is committed is kept; the same command resumes from here")
        self.exit_code = 128 + signal_number


def unreadable(path: object, error: OSError, what: str = "") -> GrpoError:
    """What to raise for a file that cannot be read: it is damaged, unless it is somebody else's.

    what: what it was read as.
    """
    if isinstance(error, PermissionError):
        return ResourceError(f"{path}: Permission denied; ask its owner for the right to read it")
    return CorruptError(f"{path}: cannot be read{what}: {error.strerror or first_line(error)}")


def first_line(error: BaseException) -> str:
    """What a library says of its error, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
