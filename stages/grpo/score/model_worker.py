"""model_worker: reward models in a process of its own: a shard's conversations -> outcomes.

The process knows nothing of the run. Each model is loaded once, with the first shard of it, and stays in main
memory; on a GPU is the one at work.
"""

import platform
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from grpo.artifacts import ActiveRun, checkpoint_id
from grpo.errors import GrpoError, UsageError
from grpo.execute import Checkpoint
from grpo.models.loading import best_device
from grpo.score.functions.built_in import Texts
from grpo.score.outcome import Outcome
from grpo.score.reward_model import RewardModel, require_weights
from grpo.score.scorer_worker import ScoringResult


class PlannedModel(NamedTuple):
    """A reward model; source: the id of its checkpoint, as planned."""

    checkpoint: Checkpoint
    source: str


@dataclass(frozen=True)
class ModelSettings:
    """What is the same for all jobs. models: by the name of their reward.

    threads: of torch, on which the last bits of a value depend.
    """

    models: dict[str, PlannedModel]
    device: str
    threads: int

    @classmethod
    def of_driver(cls, run: ActiveRun, device: str) -> "ModelSettings":
        """Those of a driver that is this process. Raises InputError (exit 4) as RewardModel."""
        models = dict[str, PlannedModel]()
        for reward in run.config.score.rewards:
            if reward.model is not None:
                folder = run.checkpoint_path(reward.model)
                require_weights(folder)
                models[reward.name] = PlannedModel(Checkpoint.of(folder), run.checkpoint_id(reward.model))
        return cls(models, device, torch.get_num_threads())


class ModelJob(NamedTuple):
    """What the model of a reward reads of one shard; of nothing, it is opened: whether it is right."""

    reward: str
    prompts: Texts
    completions: Texts
    max_tokens_per_batch: int
    timeout_s: float


class ModelScorer:
    """Does such jobs, until close()."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._open: dict[Path, RewardModel] = {}
        self._computing = ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, settings.threads))
        self._late: Future[list[Outcome]] = Future()

    def __call__(self, job: ModelJob) -> ScoringResult:
        """Score. Raises as RewardModel and its score(), as Checkpoint.seen(), UsageError for another model.

        Another thread computes, since nothing interrupts it: of a late batch this one tells meanwhile.
        """
        self._late = Future()
        found = self._computing.submit(self._score, job)
        done, _ = wait([found, self._late], return_when=FIRST_COMPLETED)
        return ScoringResult((found if found in done else self._late).result(), [])

    def close(self) -> None:
        """End the processes of the models' chat templates."""
        for model in [*self._open.values()]:  # one may be opened meanwhile
            model.close()

    def fail(self, failure: threading.ExceptHookArgs) -> None:
        """What a thread beside raises is what the job raises, as in a command it is how that ends."""
        if isinstance(failure.exc_value, GrpoError):
            self._late.set_exception(failure.exc_value)
        else:
            threading.__excepthook__(failure)

    def _score(self, job: ModelJob) -> list[Outcome]:
        model = self._opened(self._settings.models[job.reward])
        return model.score(job.prompts, job.completions, job.max_tokens_per_batch, job.timeout_s)

    def _opened(self, planned: PlannedModel) -> RewardModel:
        folder = planned.checkpoint.folder
        for other, model in self._open.items():
            if other != folder:
                model.release()
        if folder not in self._open:
            if checkpoint_id(planned.checkpoint.seen()) != planned.source:
                raise UsageError(
                    f"reward model {folder}: on {platform.node()} it is not the one that the driver planned"
                    " with; the same everywhere, and unchanged meanwhile, is right"
                )
            self._open[folder] = RewardModel(folder, self._settings.device)
        return self._open[folder]


def open_model_scorer(settings: ModelSettings) -> ModelScorer:
    """One, for all of this process. Raises UsageError (exit 2) where it has no GPU and should have."""
    if settings.device not in ("cpu", best_device()):
        raise UsageError(
            f"execution.scorers.gpus: torch finds none on {platform.node()}; a torch that does on every node"
            " with a GPU, or gpus: 0, is right"
        )
    scorer = ModelScorer(settings)
    threading.excepthook = scorer.fail
    return scorer


def opener(settings: ModelSettings) -> Callable[[], ModelScorer]:
    """open_model_scorer() of these settings, as a pool takes it."""
    return partial(open_model_scorer, settings)
