"""track: what an iteration came to -> the log, and a tracker: Trackio or Weights & Biases.

A tracker never ends a training: what it raises is said, and the command ends with exit 8 when all is done.
How far it got is noted in the run before each call, so that nothing is logged twice.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from grpo import tables
from grpo.artifacts import EVALUATION, ActiveRun, Run, files, lacking, read_sealed, seal
from grpo.errors import CorruptError, EngineError, GrpoError, UsageError, first_line
from grpo.inspect import metrics
from grpo.pipeline.runner import evaluation_is_due
from grpo.pipeline.stages import EVALUATE

# Column of `iterations` -> what a tracker gets it as.
_NAMES = {
    "reward": "reward/mean",
    "pass_rate": "reward/pass_rate",
    "groups_without_signal": "reward/groups_without_signal",
    "response_tokens": "generate/length",
    "truncated": "generate/truncated",
    "tokens_per_second": "generate/tokens_per_second",
}
# And those of its update: of `updates` what is not a key there, or counted of all rollouts in `iterations`.
_UPDATE = {"rollouts_kept", "steps", "steps_skipped", *tables.UPDATES} - {"iteration", "rollouts", "tokens"}

_NOT_INSTALLED = "track: {0}: is not installed; pip install 'grpo-stages[{0}]'"


@contextmanager
def tracking(run: ActiveRun, until: int) -> Iterator[Callable[[], None]]:
    """Yields report(), to be called when an iteration is complete or a policy measured; it never raises.

    until: what is logged is of the first so many iterations, and of the policies up to this one.

    Raises UsageError (exit 2) where the tracker is not installed and EngineError (exit 8) where it cannot be
    opened, both before the body; EngineError behind it where an iteration could not be logged.
    """
    name = run.config.track
    if name is None or not _has_more(run, _place(run, name), until):
        yield lambda: None
        return
    tracker = _Tracker(run, name, until)
    try:
        tracker.report()
        yield tracker.report
    finally:
        tracker.attempt("at its end", tracker.module.finish)
    if tracker.failure:
        raise EngineError(
            f"track: {tracker.failure}; the iterations are complete, and the next `grpo run` logs what is"
            " missing (`track: null` goes without)"
        )


class _Tracker:
    """A tracker with its run open. `failure`: what it raised first; from then on it is left alone."""

    def __init__(self, run: ActiveRun, name: str, until: int) -> None:
        self.run = run
        self.name = name
        self.until = until
        self.failure = ""
        self.module = _opened(run, name)

    def report(self) -> None:
        """Log what is complete of the first `until` iterations and not logged yet."""
        while not self.failure and (place := _place(self.run, self.name)) <= 2 * self.until:
            number = place // 2
            if _is_measured(self.run, place):
                numbers, where = evaluation_of(self.run, number), f"at the evaluation of policy {number}"
                after = place + 1
            elif number < self.until and self.run.manifest("update", number):
                numbers, where = numbers_of(self.run, number), f"at iteration {number}"
                after = 2 * number + 2
            else:
                return
            step = number
            if self.name == "wandb":
                # It takes a step once, and none that is less: each call has its own, `iteration` is the axis.
                numbers, step = {"iteration": number, **numbers}, after
            _note(self.run, self.name, after)
            if not self.attempt(where, self.module.log, numbers, step=step):
                _note(self.run, self.name, place)

    def attempt(self, where: str, call: Callable[..., object], *values: object, **options: object) -> bool:
        """Call the tracker. False: it raised, which becomes the failure."""
        if error := _error_of(call, *values, **options):
            text = f"{self.name} failed {where}: {error}"
            self.failure = self.failure or text
            self.run.console.say(f"track: {text}; training continues without it")
        return not error


def _error_of(call: Callable[..., object], *values: object, **options: object) -> str:
    """What a tracker raised as it was called; what it prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            call(*values, **options)
    except GrpoError:  # an interruption, not the tracker's
        raise
    except Exception as error:  # noqa: BLE001 - a service of others may raise anything, and training goes on
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def numbers_of(run: ActiveRun, iteration: int) -> dict[str, float]:
    """What is logged of an iteration: columns of `iterations` by grouped names, nulls left out."""
    row = metrics.row_of(run, iteration)
    numbers = {name: row[column] for column, name in _NAMES.items()}
    numbers |= {f"update/{column}": value for column, value in row.items() if column in _UPDATE}
    numbers |= {f"rewards/{name}": value for name, value in (row["rewards"] or {}).items()}
    stages = (row["stage_seconds"] or {}).items()
    return _known(numbers | {f"seconds/{name}": value for name, value in stages if name != EVALUATE.name})


def evaluation_of(run: ActiveRun, policy: int) -> dict[str, float]:
    """What is logged of a policy that was measured: evaluate/pass@1, evaluate/reward, ..."""
    summary = run.require(EVALUATION, policy, f"grpo evaluate --policy {policy}").summary
    passes = {f"evaluate/pass@{k}": value for k, value in (summary["pass_at"] or {}).items()}
    names = ("reward", "response_tokens", "truncated")
    return _known(passes | {f"evaluate/{name}": summary[name] for name in names})


def _known(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _has_more(run: ActiveRun, place: int, until: int) -> bool:
    """Whether there is something to log, or will be."""
    if place != 2 * until:
        return place < 2 * until
    return _is_measured(run, place) or evaluation_is_due(run, until, until)


def _is_measured(run: ActiveRun, place: int) -> bool:
    """Whether the evaluation of the policy that the next iteration samples from is to be logged."""
    manifest = run.manifest(EVALUATION, place // 2)
    return place % 2 == 0 and manifest is not None and not lacking(run, manifest)


def note_path(run: Run) -> Path:
    """Where it is noted how far the trackers of a run got."""
    return run.path / ".track.json"


def read_note(run: Run) -> dict[str, Any]:
    """By tracker what it was given. Raises CorruptError (exit 6), which says the way out."""
    path = note_path(run)
    try:
        return read_sealed(path) if path.exists() else {}
    except CorruptError as error:
        raise CorruptError(
            f"{error}; it only notes how far the tracker got: remove it, and the next `grpo run` logs every"
            " iteration again, which the tracker may show twice (`track: null` goes without)"
        ) from None


def _place(run: Run, name: str) -> int:
    """How far a tracker got in policy 0, iteration 0, policy 1, iteration 1, ...

    A policy is logged before the iteration that samples from it, the last one too; or passed over with it.
    """
    held = read_note(run)
    iterations = int(held.get(name, 0))
    return iterations + int(held.get(f"{name}/evaluate", iterations))


def _note(run: Run, name: str, place: int) -> None:
    held = {**read_note(run), name: place // 2, f"{name}/evaluate": (place + 1) // 2}
    files.write_file(note_path(run), seal(held))


def check_tracker(name: str) -> str:
    """A line where it may not let us log. Raises UsageError (exit 2) where it is not installed.

    Nothing of it is imported, and nobody is asked.
    """
    try:
        there = find_spec(name) is not None
    except ValueError:  # it was tried before, and is not
        there = False
    if not there:
        raise UsageError(_NOT_INSTALLED.format(name))
    away = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if name != "wandb" or away or os.environ.get("WANDB_API_KEY"):
        return ""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc(os.environ.get("NETRC") or None).authenticators(host)
    except (OSError, NetrcParseError):
        known = None
    if known:
        return ""
    return f"nobody is logged in to {host}: `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"


def _opened(run: ActiveRun, name: str) -> ModuleType:
    """The package of a tracker, with the run open in it."""
    # Weights & Biases reads it when it is imported. It reports its own errors to its maker otherwise.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        module = import_module(name)
    except ImportError:
        raise UsageError(_NOT_INSTALLED.format(name)) from None
    if error := _error_of(_init, run, module):
        raise EngineError(
            f"track: {name} cannot be opened: {error}; nothing was sampled (`track: null` goes without)"
        )
    return module


def _init(run: ActiveRun, module: ModuleType) -> None:
    # The folder of the configuration, so that its runs stand side by side; without what wandb refuses.
    project = re.sub(r"[/\\#?%:]", "-", run.imports.name) or "grpo"
    init = partial(
        module.init, project=project, name=run.name, config=run.config.model_dump(), resume="allow"
    )
    if module.__name__ == "trackio":
        init(embed=False)
        return
    # Of what it would send unasked: no output, no code, no git state. GPU and memory curves are a part of it.
    settings = module.Settings(
        console="off", save_code=False, disable_code=True, disable_git=True, disable_job_creation=True
    )
    init(id=run.name, settings=settings)
    module.define_metric("iteration")
    module.define_metric("*", step_metric="iteration")
