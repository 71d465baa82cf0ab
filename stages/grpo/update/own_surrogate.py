"""own_surrogate: the user's own function to maximise, `update.surrogate: my_loss:surrogate`.

It runs in this process, once per micro-batch: unlike a reward it is a part of the loss, differentiated.
"""

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.abc import SourceLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.artifacts import ActiveRun
from grpo.errors import EngineError, UsageError, listed
from grpo.update.plan import surrogate_file

OFFERED = ("logprobs", "old_logprobs", "advantages", "rollout", "mask")
_NO_GRADIENT = "the value has no gradient by logprobs: is everything detached?"
_LONGEST = 400  # characters of a message; an exception may hold a tensor


class _ProblemError(Exception):
    """What is wrong with the function or what it returned, for a message."""


class NotFiniteError(Exception):
    """The function returned nan or inf for `rollouts`, their places in the micro-batch."""

    def __init__(self, name: str, rollouts: list[int]) -> None:
        super().__init__(f"update.surrogate: {name}: returned nan or inf")
        self.rollouts = rollouts


class _Source(SourceLoader):
    """A module from the very bytes whose sha256 is in the fingerprint: no .pyc is read, and none written."""

    def __init__(self, file: Path) -> None:
        self.file, self.content = file, file.read_bytes()

    def get_filename(self, fullname: str) -> str:
        """Its path, for tracebacks."""
        return str(self.file)

    def get_data(self, path: Any) -> bytes:
        """What it holds; importlib asks for nothing else."""
        return self.content


@dataclass(frozen=True)
class OwnSurrogate:
    """The user's function, its source, and whether it returns one value per rollout or one per token."""

    name: str
    file: Path
    sha256: str
    function: Callable[..., Any]
    keywords: tuple[str, ...]
    per_rollout: bool = False
    folder: Path | None = None  # of the configuration

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: it reads the same file."""
        return _loaded, (self.folder, self.name, self.file, self.sha256)

    def __call__(
        self, logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, rollout_N: Tensor
    ) -> Tensor:
        """Its value for a micro-batch, [N] or [B].

        Raises EngineError (exit 8) for one that cannot be used, NotFiniteError for one that is not finite.
        """
        try:
            value = self._value(logprobs_N, old_logprobs_N, advantages_N, rollout_N)
            num_values = int(rollout_N[-1]) + 1 if self.per_rollout else len(rollout_N)
            if value.shape != (num_values,):
                per = "rollout" if self.per_rollout else "token"
                raise _ProblemError(
                    f"returned shape {tuple(value.shape)}, not ({num_values},), which is one value per {per}"
                )
        except _ProblemError as problem:
            raise EngineError(f"update.surrogate: {self.name}: {problem}; nothing was committed") from None
        if len(broken := (~value.isfinite()).nonzero().flatten()):
            rollouts = broken if self.per_rollout else rollout_N[broken]
            raise NotFiniteError(self.name, sorted(set(rollouts.tolist())))
        return value

    def checked(self) -> "OwnSurrogate":
        """Itself, with what a call on two made-up rollouts, of 3 and 2 tokens, told of its value.

        Raises UsageError (exit 2) for a value that cannot be maximised.
        """
        logprobs_N = torch.tensor([-0.7, -1.6, -0.3, -2.1, -1.2], requires_grad=True)
        old_N = logprobs_N.detach() + torch.tensor([0.01, -0.01, 0.02, -0.02, 0.01])
        advantages_N, rollout_N = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5]), torch.tensor([0, 0, 0, 1, 1])
        try:
            value = self._value(logprobs_N, old_N, advantages_N, rollout_N)
            if value.shape not in ((5,), (2,)):
                raise _ProblemError(
                    f"returned shape {tuple(value.shape)} for 2 rollouts of 5 tokens in all: one value per"
                    " token is (5,), one per rollout (2,)"
                )
            if not bool(value.isfinite().all()):
                raise _ProblemError("returned nan or inf for made-up rollouts near pi_old")
            [slope_N] = torch.autograd.grad(value.sum(), logprobs_N, allow_unused=True)
            if slope_N is None:
                raise _ProblemError(_NO_GRADIENT)
            if not bool(slope_N.isfinite().all()):
                raise _ProblemError("the gradient by logprobs is not finite on made-up rollouts near pi_old")
        except _ProblemError as problem:
            raise UsageError(f"update.surrogate: {self.name}: {problem}") from None
        return replace(self, per_rollout=value.shape == (2,))

    def _value(
        self, logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, rollout_N: Tensor
    ) -> Tensor:
        # Clones: what it changes in place is not what the KL term and the tables read.
        offered = {
            "logprobs": logprobs_N.clone(),
            "old_logprobs": old_logprobs_N.clone(),
            "advantages": advantages_N.clone(),
            "rollout": rollout_N.clone(),
            "mask": torch.ones_like(rollout_N, dtype=torch.bool),
        }
        with _explained(self.file):
            value = self.function(**{name: offered[name] for name in self.keywords})
        if not isinstance(value, Tensor):
            raise _ProblemError(f"returned {type(value).__name__}, not a tensor")
        if not value.is_floating_point() or value.device != logprobs_N.device:
            expected = f"a floating type on {logprobs_N.device}"
            raise _ProblemError(f"returned {value.dtype} on {value.device}, not {expected}")
        if not value.requires_grad:
            raise _ProblemError(_NO_GRADIENT)
        return value


def surrogate_of(run: ActiveRun, kept: Path | None = None) -> OwnSurrogate | None:
    """The user's surrogate as its file is now, or as it was `kept`; None: it is one of ours.

    Raises UsageError (exit 2) as load() does, and where other keys do not fit it.
    """
    config = run.config.update
    if config.own is None:
        return None
    own = load(run.imports, config.own, kept)
    by_token = config.sampler_correction != "none" and config.sampler_correction_level == "token"
    if own.per_rollout and (by_token or config.top_entropy is not None):
        way = "set sampler_correction_level: sequence_mean" if by_token else "leave top_entropy out"
        raise UsageError(
            f"update.surrogate: {own.name} returns one value per rollout, which weights and masks per token"
            f" do not fit; {way}"
        )
    if own.per_rollout and run.config.score.teachers:
        raise UsageError(
            f"update.surrogate: {own.name} returns one value per rollout, and score.teachers give each token"
            " an advantage of its own; return one value per token"
        )
    return own


def load(folder: Path, name: str, kept: Path | None = None) -> OwnSurrogate:
    """The function `module:function` of a file in the configuration's `folder`, tried on made-up rollouts.

    kept: the file in place of that one.

    Raises UsageError (exit 2) for what cannot be imported, called or maximised.
    """
    source = _Source(kept or surrogate_file(folder, name))
    module_name, _, function_name = name.partition(":")
    spec = spec_from_loader(f"_own_surrogate.{module_name}", source, origin=str(source.file))
    assert spec is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where a dataclass in it looks for it
    # Last: what lies beside the configuration must not stand in for a library's module.
    sys.path.append(str(folder))
    try:
        with _explained(source.file):
            source.exec_module(module)
        function = getattr(module, function_name, None)
        if not callable(function):
            there = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
            raise _ProblemError(
                f"no function {function_name} in {source.file.name}; it has: {listed(there, function_name)}"
            )
        keywords = _keywords(function)
    except _ProblemError as problem:
        raise UsageError(f"update.surrogate: {name}: {problem}") from None
    finally:
        sys.path.remove(str(folder))
    digest = sha256(source.content).hexdigest()
    return OwnSurrogate(name, source.file, digest, function, keywords, folder=folder).checked()


@cache
def _loaded(folder: Path, name: str, file: Path, digest: str) -> OwnSurrogate:
    """What another process loaded. Raises EngineError (exit 8) where the file is another by now."""
    found = load(folder, name, file)
    if found.sha256 != digest:
        raise EngineError(f"{file} changed as the update began; run it again; nothing was committed")
    return found


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Which of OFFERED it takes, all by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise _ProblemError("does not tell its parameters (compiled code); wrap it in a function") from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return OFFERED
    for p in parameters:
        required = p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        if required and (p.name not in OFFERED or p.kind is p.POSITIONAL_ONLY):
            raise _ProblemError(f"needs {p.name}; what it gets, by keyword: {', '.join(OFFERED)}")
    return tuple(p.name for p in parameters if p.name in OFFERED)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """What it prints goes to stderr, and what it raises is a _ProblemError that names the line of `file`."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's code raises is the answer
        said = [f"SyntaxError: {error}"] if isinstance(error, SyntaxError) else []  # of four lines otherwise
        text = " ".join(" ".join(said or traceback.format_exception_only(error)).split())[:_LONGEST]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        place = f" ({file.name}, line {lines[-1]})" if lines and not said else ""
        raise _ProblemError(f"{text}{place}") from None
