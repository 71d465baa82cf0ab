"""track: what an iteration came to -> the tracker that `track` names, Trackio or Weights & Biases.

A tracker is for looking at; the tables hold the truth. So it never ends a training: what it raises is said,
the run goes on without it, and the command ends with exit 8 when all is done. How far it got is noted in the
run before each call, so that no iteration is logged twice; the next `grpo run` logs what is missing.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType

from grpo.artifacts import EVALUATION, Run, files, read_sealed, seal
from grpo.errors import EngineError, GrpoError, UsageError
from grpo.status import summary_of

_NOTE = ".track.json"
_COUNTED = ("iteration", "epoch", "step", "skipped")  # columns of `updates` that are no measurements


@contextmanager
def tracking(run: Run, until: int) -> Iterator[Callable[[int], None]]:
    """Yields report(iteration), to be called when one of the first `until` is complete; it never raises.

    Raises UsageError (exit 2) where the tracker is not installed and EngineError (exit 8) where it cannot be
    opened, both before the body; EngineError behind it where an iteration could not be logged.
    """
    name = run.config.track
    if name is None or _logged(run, name) >= until:
        yield lambda _: None
        return
    tracker = _Tracker(run, name)
    try:
        tracker.report(until - 1)
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

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.name = name
        self.failure = ""
        self.module = _OPEN[name](run)

    def report(self, iteration: int) -> None:
        """Log what is complete up to `iteration` and not logged yet."""
        for number in range(_logged(self.run, self.name), iteration + 1):
            if self.failure or self.run.manifest("update", number) is None:
                return
            numbers = numbers_of(self.run, number)
            _note(self.run, self.name, number + 1)
            if not self.attempt(f"at iteration {number}", partial(self.module.log, numbers, step=number)):
                _note(self.run, self.name, number)

    def attempt(self, where: str, call: Callable[[], object]) -> bool:
        """Call the tracker; what it prints goes to stderr. False: it raised, which becomes the failure."""
        try:
            with redirect_stdout(sys.stderr):
                call()
        except GrpoError:  # an interruption, not the tracker's
            raise
        except Exception as error:  # noqa: BLE001 - a service of others may raise anything, and training goes on
            reason = (str(error).splitlines() or [""])[0]
            text = f"{self.name} failed {where}: {type(error).__name__}: {reason}"
            self.failure = self.failure or text
            self.run.console.say(f"track: {text}; training goes on without it")
            return False
        return True


def numbers_of(run: Run, iteration: int) -> dict[str, float]:
    """What is logged of an iteration, by grouped names such as reward/mean, update/kl, seconds/generate.

    rewards/<name>: the mean of a reward over the rollouts that have it. update/<column>: of `updates`, the
    mean over the steps taken, of a column ending in _max the largest. What is not known is left out.
    """
    summary = summary_of(run, iteration)
    numbers = {
        "reward/mean": summary["reward"],
        "generate/length": summary["length"],
        "generate/truncated": summary["truncated"],
        **{f"seconds/{stage}": seconds for stage, seconds in summary["seconds"].items()},
    }
    rewards = (
        run.read("rewards", iteration, ["name", "value"]).group_by("name").aggregate([("value", "mean")])
    )
    numbers |= {f"rewards/{row['name']}": row["value_mean"] for row in rewards.to_pylist()}
    steps = run.read("updates", iteration).to_pylist()
    taken = [step for step in steps if not step["skipped"]]
    for column in (name for name in steps[0] if name not in _COUNTED):
        values = [step[column] for step in taken if step[column] is not None]
        if values:
            numbers[f"update/{column}"] = (
                max(values) if column.endswith("_max") else sum(values) / len(values)
            )
    numbers["update/steps_skipped"] = len(steps) - len(taken)
    numbers |= _of_evaluation(run, iteration)
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _of_evaluation(run: Run, policy: int) -> dict[str, float | None]:
    """Of the policy sampled from: evaluate/pass@1, evaluate/reward, ...; nothing where it is not measured."""
    manifest = run.manifest(EVALUATION, policy)
    if manifest is None:
        return {}
    names = ("reward", "response_tokens", "truncated")
    passes = {f"evaluate/pass@{k}": value for k, value in (manifest.summary["pass_at"] or {}).items()}
    return {**passes, **{f"evaluate/{name}": manifest.summary[name] for name in names}}


def _logged(run: Run, name: str) -> int:
    """How many iterations, from 0 on, the tracker has been given."""
    path = _note_path(run)
    return int(read_sealed(path).get(name, 0)) if path.exists() else 0


def _note(run: Run, name: str, count: int) -> None:
    path = _note_path(run)
    held = read_sealed(path) if path.exists() else {}
    files.write_file(path, seal({**held, name: count}))


def _note_path(run: Run) -> Path:
    return run.path / _NOTE


def _open_trackio(run: Run) -> ModuleType:
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


def _open_wandb(run: Run) -> ModuleType:
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
    return _opened(
        wandb,
        lambda: wandb.init(
            project=_project(run),
            name=run.name,
            id=run.name,
            config=run.config.model_dump(),
            resume="allow",
            settings=settings,
        ),
    )


def _opened(module: ModuleType, init: Callable[[], object]) -> ModuleType:
    try:
        with redirect_stdout(sys.stderr):
            init()
    except GrpoError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise EngineError(
            f"track: {module.__name__} cannot be opened: {type(error).__name__}: {reason}; nothing was"
            " sampled (`track: null` goes without)"
        ) from error
    return module


def _missing(name: str) -> UsageError:
    return UsageError(f"track: {name}: is not installed; pip install 'grpo-stages[{name}]'")


def _project(run: Run) -> str:
    """The folder of the configuration, so that its runs stand side by side; without what wandb refuses."""
    return re.sub(r"[/\\#?%:]", "-", run.imports.name) or "grpo"


_OPEN: dict[str, Callable[[Run], ModuleType]] = {"trackio": _open_trackio, "wandb": _open_wandb}
