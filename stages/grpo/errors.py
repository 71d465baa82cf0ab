"""errors: what a user can do something about.

Every mistake that is not a bug of ours is a GrpoError: one line that says where, what was found and what
would be right. `main()` in cli/entry.py prints that line and exits with the code of the class; nothing else
catches it.
"""


class GrpoError(Exception):
    """A fault with a one-line message for the user; `exit_code` is the exit status of the command."""

    exit_code = 1


class UsageError(GrpoError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class DataError(GrpoError):
    """The user's data, or what a model produced, cannot be used."""

    exit_code = 3


class InputError(GrpoError):
    """Something a stage reads is missing, stale, or differs from what is configured."""

    exit_code = 4


class LockedError(GrpoError):
    """Another process works on the run."""

    exit_code = 5


class CorruptError(GrpoError):
    """A committed file is not what its manifest says."""

    exit_code = 6


class ResourceError(GrpoError):
    """The machine has not enough of something (disk, memory)."""

    exit_code = 7


class EngineError(GrpoError):
    """The engine, the learner or a reward failed while it worked."""

    exit_code = 8


class Interrupted(GrpoError):
    """The user asked to stop; what is committed stays. SIGINT exits 130, SIGTERM 143."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted: what is committed is kept; the same command resumes from here")
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """What a library says of its error, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
