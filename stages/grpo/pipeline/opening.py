"""opening: a configuration -> its run, and a run that is ready to be worked on.

The commands and Python both begin here.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from grpo.artifacts import ARTIFACTS, ActiveRun, roll_forward
from grpo.config import load
from grpo.console import Console
from grpo.pipeline.prepare import check_local_models, prepare
from grpo.pipeline.restart import finish_start_over


def configured(path: Path, overrides: Sequence[str], quiet: bool = False) -> ActiveRun:
    """The run of a configuration, which need not be there yet. Raises UsageError (exit 2) as load() does."""
    return ActiveRun(ARTIFACTS, load(path, overrides), path.absolute().parent, Console(quiet))


@contextmanager
def working(run: ActiveRun) -> Iterator[ActiveRun]:
    """The run, locked and prepared for work. LockedError (exit 5); InputError (4) for one made otherwise."""
    check_local_models(run)  # before there is a folder of the run
    with locked(run, removed_too=True):
        prepare(run)
        finish_start_over(run)
        yield run


@contextmanager
def locked(run: ActiveRun, removed_too: bool = False) -> Iterator[ActiveRun]:
    """A run that nobody else works on, with every commit finished that a crash cut off.

    Where it has a mirror, that is what the run is when the `with` block ends; removed_too: as for mirrored().
    """
    with run.console.signals(), run.lock(run.console):
        roll_forward(run)
        with _mirror(run, removed_too):
            yield run


def _mirror(run: ActiveRun, removed_too: bool) -> AbstractContextManager[None]:
    if run.config.artifacts.mirror is None:
        return nullcontext()
    from grpo.mirror.driver import mirrored

    return mirrored(run, removed_too)
