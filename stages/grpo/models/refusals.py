"""refusals: transformers without a word of its own; what it raises of a checkpoint is one line of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch
from safetensors import SafetensorError
from torch import distributed
from transformers.utils import logging as transformers_logging

from grpo.errors import CorruptError, GrpoError, InputError, ResourceError, UsageError

_UNREADABLE = "its weights cannot be read"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or load reports on stderr: what matters in them is raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def refusals(where: str, message: str) -> Iterator[None]:
    """transformers without a word of its own: whatever it raises of a checkpoint is one line of ours.

    What other processes raise, that compute with this one, is none of a checkpoint.
    Exception, because a checkpoint of others may make it raise any: its code trusts what it reads.
    """
    try:
        with quiet_transformers():
            yield
    except GrpoError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{where}: out of memory: {_one_line(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        if is_of_connection(error):
            raise
        what = _UNREADABLE if isinstance(error, SafetensorError) else message
        what = "its files are nested too deep" if isinstance(error, RecursionError) else what
        raise CorruptError(f"{where}: {what}: {_one_line(error)}") from error
    except Exception as error:
        text = _one_line(error)
        if "trust_remote_code" in str(error):
            text = (
                "it needs code of its own, which never runs here (model_options.trust_remote_code stays"
                " false); take a checkpoint of a model that transformers has"
            )
        kind = UsageError if isinstance(error, ImportError) else InputError  # a package that is missing
        raise kind(f"{where}: {message}: {text}") from error


def is_of_connection(error: Exception) -> bool:
    """Whether it is of a process that computes with this one; gloo says what happened in its text alone."""
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection", "Timed out", "NCCL")
    )


def _one_line(error: Exception) -> str:
    kind, text = type(error).__name__, str(error)
    # `KeyError: 'x'`: such texts say nothing by themselves.
    named = isinstance(error, LookupError | AttributeError | ArithmeticError | AssertionError)
    text = f"{kind}: {text}" if text and named else text or kind
    return shorten(text, width=300, placeholder=" ...")
