"""model_openers: what opens a process of reward models, with something wrong in it. Workers import it."""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grpo.execute import checkpoint
from grpo.score import model_worker
from grpo.score.model_worker import ModelScorer, ModelSettings, open_model_scorer
from grpo.score.reward_model import RewardModel


def opened_by(monkeypatch: pytest.MonkeyPatch, open_worker: Callable[..., Any], *arguments: Any) -> None:
    """Have workers opened by one of these functions."""
    monkeypatch.setattr(model_worker, "opener", partial(partial, open_worker, *arguments))


def open_mute(settings: ModelSettings) -> ModelScorer:
    """Its models can be opened, and compute nothing."""
    pytest.MonkeyPatch().setattr(RewardModel, "_values", None)
    return open_model_scorer(settings)


def open_noting(note: Path, settings: ModelSettings) -> ModelScorer:
    """It notes which models it loads, a line each."""
    load = RewardModel.__init__

    def loaded(self: RewardModel, directory: Path, *more: Any) -> None:
        with note.open("a") as file:
            file.write(f"{os.getpid()} {directory.name}\n")
        load(self, directory, *more)

    pytest.MonkeyPatch().setattr(RewardModel, "__init__", loaded)
    return open_model_scorer(settings)


def open_hanging(settings: ModelSettings) -> ModelScorer:
    """Its first batch never ends."""
    pytest.MonkeyPatch().setattr(RewardModel, "_values", lambda *rows: threading.Event().wait())
    return open_model_scorer(settings)


def open_blind(settings: ModelSettings) -> ModelScorer:
    """As on a machine that lacks the folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr(checkpoint, "SEEN_S", 0.2)
    patch.setattr(checkpoint, "_size_of", lambda path: None)
    return open_model_scorer(settings)


def open_misled(settings: ModelSettings) -> ModelScorer:
    """As on a machine that has something else there."""
    pytest.MonkeyPatch().setattr(model_worker, "checkpoint_id", lambda folder: "another")
    return open_model_scorer(settings)


def open_on_gpu(note: Path, settings: ModelSettings) -> ModelScorer:
    """As with a torch that finds the GPU, which is none; which one Ray has given is noted."""
    note.write_text(f"{settings.device} {os.environ['CUDA_VISIBLE_DEVICES']}")
    return open_model_scorer(ModelSettings(settings.models, "cpu", settings.threads))
