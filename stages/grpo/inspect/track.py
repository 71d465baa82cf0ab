"""track: what an iteration came to -> the tracker that `track` names, Trackio or Weights & Biases.

A tracker is for looking at; the tables hold the truth. So it never ends a training: what it raises is said,
the run goes on without it, and the command ends with exit 8 when all is done. How far it got is noted in the
run before each call, so that nothing is logged twice; the next `grpo run` logs what is missing. A policy that
was measured is logged before the iteration that samples from it, the last one too.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.artifacts import EVALUATION, ActiveRun, files, lacking, read_sealed, seal
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
    **{
        name: f"update/{name}"
        for name in (
            *("rollouts_kept", "steps", "steps_skipped", "loss", "policy_loss", "kl", "entropy"),
            *(
                "ratio_mean",
                "ratio_max",
                "clip_fraction_low",
                "clip_fraction_high",
                "grad_norm",
                "learning_rate",
            ),
            *("mismatch_mean", "mismatch_max", "mismatch_kl", "effective_sample_size", "over_cap_fraction"),
        )
    },
}


@dataclass(frozen=True)
class Sent:
    """How far a tracker got, from 0 on."""

    iterations: int
    policies: int
    """Of which the evaluation was logged, or is not any more; as many as `iterations`, or one more."""


@contextmanager
def tracking(run: ActiveRun, until: int) -> Iterator[Callable[[], None]]:
    """Yields report(), to be called when an iteration is complete or a policy measured; it never raises.

    until: what is logged is of the first so many iterations, and of the policies up to this one.

    Raises UsageError (exit 2) where the tracker is not installed and EngineError (exit 8) where it cannot be
    opened, both before the body; EngineError behind it where an iteration could not be logged.
    """
    name = run.config.track
    if name is None or not _has_more(run, name, until):
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
        self.module = _OPEN[name](run)

    def report(self) -> None:
        """Log what is complete of the first `until` iterations and not logged yet."""
        while not self.failure:
            sent = _sent(self.run, self.name)
            number = sent.iterations
            if _is_measured(self.run, sent, self.until):
                numbers, where = evaluation_of(self.run, number), f"at the evaluation of policy {number}"
                after = Sent(number, number + 1)
            elif _is_complete(self.run, sent, self.until):
                numbers, where = numbers_of(self.run, number), f"at iteration {number}"
                after = Sent(number + 1, number + 1)
            else:
                return
            _note(self.run, self.name, after)
            log = partial(_LOG[self.name], self.module, numbers, number, after)
            if not self.attempt(where, log):
                _note(self.run, self.name, sent)

    def attempt(self, where: str, call: Callable[[], object]) -> bool:
        """Call the tracker; what it prints goes to stderr. False: it raised, which becomes the failure."""
        try:
            with redirect_stdout(sys.stderr):
                call()
        except GrpoError:  # an interruption, not the tracker's
            raise
        except Exception as error:  # noqa: BLE001 - a service of others may raise anything, and training goes on
            text = f"{self.name} failed {where}: {type(error).__name__}: {first_line(error)}"
            self.failure = self.failure or text
            self.run.console.say(f"track: {text}; training continues without it")
            return False
        return True


def numbers_of(run: ActiveRun, iteration: int) -> dict[str, float]:
    """What is logged of an iteration: columns of `iterations` by grouped names, nulls left out."""
    row = metrics.row_of(run, iteration)
    numbers = {name: row[column] for column, name in _NAMES.items()}
    numbers |= {f"rewards/{name}": value for name, value in (row["rewards"] or {}).items()}
    stages = (row["stage_seconds"] or {}).items()
    numbers |= {f"seconds/{name}": value for name, value in stages if name != EVALUATE.name}
    return _known(numbers)


def evaluation_of(run: ActiveRun, policy: int) -> dict[str, float]:
    """What is logged of a policy that was measured: evaluate/pass@1, evaluate/reward, ..."""
    summary = run.require(EVALUATION, policy, f"grpo evaluate --policy {policy}").summary
    names = ("reward", "response_tokens", "truncated")
    passes = {f"evaluate/pass@{k}": value for k, value in (summary["pass_at"] or {}).items()}
    return _known({**passes, **{f"evaluate/{name}": summary[name] for name in names}})


def _known(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _has_more(run: ActiveRun, name: str, until: int) -> bool:
    """Whether there is something to log, or will be."""
    sent = _sent(run, name)
    return (
        sent.iterations < until
        or _is_measured(run, sent, until)
        or (sent.policies <= until and evaluation_is_due(run, until, until))
    )


def _is_measured(run: ActiveRun, sent: Sent, until: int) -> bool:
    """Whether the evaluation of the policy that the next iteration samples from is to be logged."""
    if sent.policies > sent.iterations or sent.iterations > until:
        return False
    manifest = run.manifest(EVALUATION, sent.iterations)
    return manifest is not None and not lacking(run, manifest)


def _is_complete(run: ActiveRun, sent: Sent, until: int) -> bool:
    return sent.iterations < until and run.manifest("update", sent.iterations) is not None


def note_path(run: ActiveRun) -> Path:
    """Where it is noted how far the trackers of a run got."""
    return run.path / ".track.json"


def read_note(run: ActiveRun) -> dict[str, Any]:
    """By tracker what it was given. Raises CorruptError (exit 6), which says the way out."""
    path = note_path(run)
    try:
        return read_sealed(path) if path.exists() else {}
    except CorruptError as error:
        raise CorruptError(
            f"{error}; it only notes how far the tracker got: remove it, and the next `grpo run` logs every"
            " iteration again, which the tracker may show twice (`track: null` goes without)"
        ) from None


def _sent(run: ActiveRun, name: str) -> Sent:
    held = read_note(run)
    iterations = int(held.get(name, 0))
    return Sent(iterations, int(held.get(f"{name}/evaluate", iterations)))


def _note(run: ActiveRun, name: str, sent: Sent) -> None:
    files.write_file(
        note_path(run), seal({**read_note(run), name: sent.iterations, f"{name}/evaluate": sent.policies})
    )


def _open_trackio(run: ActiveRun) -> ModuleType:
    try:
        import trackio
    except ImportError:
        raise _missing("trackio") from None
    return _opened(
        trackio,
        lambda: trackio.init(
            project=_project(run), name=run.name, config=run.config.model_dump(), resume="allow", embed=False
        ),
    )


def _open_wandb(run: ActiveRun) -> ModuleType:
    # Read when it is imported. It reports its own errors to its maker otherwise.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    # Of what it would send unasked: no output, no code, no git state. GPU and memory curves are a part of it.
    settings = wandb.Settings(
        console="off", save_code=False, disable_code=True, disable_git=True, disable_job_creation=True
    )

    def init() -> None:
        wandb.init(
            project=_project(run),
            name=run.name,
            id=run.name,
            config=run.config.model_dump(),
            resume="allow",
            settings=settings,
        )
        wandb.define_metric("iteration")
        wandb.define_metric("*", step_metric="iteration")

    return _opened(wandb, init)


def _opened(module: ModuleType, init: Callable[[], object]) -> ModuleType:
    try:
        with redirect_stdout(sys.stderr):
            init()
    except GrpoError:
        raise
    except Exception as error:
        raise EngineError(
            f"track: {module.__name__} cannot be opened: {type(error).__name__}: {first_line(error)};"
            " nothing was sampled (`track: null` goes without)"
        ) from error
    return module


def _missing(name: str) -> UsageError:
    return UsageError(f"track: {name}: is not installed; pip install 'grpo-stages[{name}]'")


def _project(run: ActiveRun) -> str:
    """The folder of the configuration, so that its runs stand side by side; without what wandb refuses."""
    return re.sub(r"[/\\#?%:]", "-", run.imports.name) or "grpo"


def _log_trackio(module: ModuleType, numbers: dict[str, float], iteration: int, after: Sent) -> None:
    module.log(numbers, step=iteration)


def _log_wandb(module: ModuleType, numbers: dict[str, float], iteration: int, after: Sent) -> None:
    """It takes a step once, and none that is less: so each call has its own, and `iteration` is the axis."""
    module.log({"iteration": iteration, **numbers}, step=after.iterations + after.policies)


_OPEN: dict[str, Callable[[ActiveRun], ModuleType]] = {"trackio": _open_trackio, "wandb": _open_wandb}
_LOG = {"trackio": _log_trackio, "wandb": _log_wandb}
