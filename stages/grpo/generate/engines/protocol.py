"""protocol: what the generate stage asks of a sampler. Nothing here imports torch or vllm.

An engine is opened once per run and kept between iterations. It yields a group as soon as its K samples are
done, in any order: the stage decides when a shard is complete.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from grpo.errors import DataError
from grpo.generate.engines.tail import Tail

if TYPE_CHECKING:
    from grpo.models.weights import Weights

MAX_SAMPLES = 2**20  # samples of one group; their seeds are consecutive, so the group's leaves this room


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy (evaluation only: a greedy token has no useful ratio).

    top_p < 1, top_k and min_p > 0 truncate the distribution, a repetition_penalty other than 1 and
    structured_outputs change it; log-probs are then those of what is sampled from.
    stop: texts that end a response once they appear in it; its tokens stay as they were sampled.
    structured_outputs: one of regex, json, choice and grammar, as vLLM takes it.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    structured_outputs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """One group: a prompt and the seeds of its K samples (63-bit, one per sample)."""

    group_id: int
    prompt_token_ids: Sequence[int]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Sample:
    """One response. Example: token_ids [55, 256], logprobs [-0.7, -0.1], finish_reason "stop"."""

    token_ids: np.ndarray  # int32 [T], with the end-of-sequence token where it was sampled
    logprobs: np.ndarray  # float32 [T], log pi_old of each token after temperature, so <= 0
    # `stop` (an end-of-sequence token or a stop text), `length` (max_new_tokens reached) or `abort`
    finish_reason: str


@dataclass(frozen=True)
class Group:
    """The K samples of one request, in the order of its seeds."""

    group_id: int
    samples: Sequence[Sample]


OnProgress = Callable[[int, int], object]
"""Told how many tokens were sampled, and how many samples ended, since it was called last."""


class Engine(Protocol):
    """A sampler. Calls come from one thread: load, score, sample, ..., release, take, ..., close."""

    precision: str
    """What the engine computes in, known once weights are there: `float32`, `bfloat16`, `fp8`, ..."""
    device: str
    """Where it takes weights from without another copy there, as torch names it."""
    tail: Tail
    """Its seconds in which under half of the samples were under way that it can have under way at a time."""

    def load(self, checkpoint: Path) -> None:
        """Take the weights of `checkpoint`, a Hugging Face directory; drop everything cached before."""

    def take(self, weights: "Weights") -> None:
        """The same of weights in memory, where they may stay: until release() they must not change."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs at temperature 1 of every token but the first, float32 [len(sequence) - 1] each."""

    def sample(
        self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
    ) -> Iterator[Group]:
        """Yield every group of every shard exactly once; on_progress: as it goes.

        An engine that promises the same bytes on a resumed run samples each shard as a whole, so that a
        shard's bytes do not depend on which other shards are asked for.
        """

    def release(self) -> None:
        """Leave the accelerator's memory to others. load() or take() comes before the next use."""

    def close(self) -> None:
        """Give back memory and processes."""


def check_requests(
    requests: Sequence[Request], sampling: Sampling, vocabulary_size: int, room: int | None
) -> None:
    """Raise DataError (exit 3) for a token or a position the model does not have: engines crash, or cut.

    room: positions for prompt and response together; None: no limit.
    """
    for request in requests:
        where, length = f"generate: group {request.group_id}", len(request.prompt_token_ids)
        if length == 0:
            raise DataError(f"{where}: the prompt has no tokens; at least one is needed")
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocabulary_size:
            raise DataError(f"{where}: prompt token outside the model's vocabulary of {vocabulary_size}")
        if room is not None and length + sampling.max_new_tokens > room:
            need = f"{length} prompt tokens + max_new_tokens {sampling.max_new_tokens}"
            raise DataError(f"{where}: {need} do not fit the model's context of {room}")


def group_seed(seed: int, iteration: int | str, group_id: int) -> int:
    """Seed of sample 0 of a group; sample s has this plus s. iteration: a word where it is not training.

    A hash, not a sum: with seed, seed + 1, ... neighbouring groups would share most of their samples.
    """
    digest = blake2b(f"{seed}/{iteration}/{group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (2**63 - MAX_SAMPLES)
