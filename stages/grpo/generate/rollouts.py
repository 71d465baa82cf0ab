"""rollouts: the groups of a shard -> rows of `rollouts`, checked. B samples of the shard, N tokens of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.errors import DataError
from grpo.generate.engines.protocol import Group, Request, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SCHEMA = tables.schema("rollouts")


@dataclass(frozen=True)
class Draws:
    """What an iteration drew, by group_id: row in `prompts`, text and tokens as the model sees them."""

    prompt_ids: list[int]
    texts: list[str]
    token_ids: list[list[int]]
    by_query: int | None = None
    """Groups whose prompt generate.prompts_sql gave; null: there is no query."""


def rollouts_table(
    requests: Sequence[Request],
    groups: Sequence[Group],
    draws: Draws,
    tokenizer: "PreTrainedTokenizerBase",
    vocabulary_size: int,
    **constants: Any,
) -> pa.Table:
    """One shard, a row per sample in key order; groups[i] answers requests[i], constants are in every row.

    Raises DataError (exit 3) for what the learner could not trust.
    """
    _check_counts(requests, groups, constants["iteration"])
    samples = [sample for group in groups for sample in group.samples]
    group_ids = [request.group_id for request in requests for _ in request.seeds]
    sample_ids = [number for request in requests for number in range(len(request.seeds))]
    lengths_B = np.array([len(sample.token_ids) for sample in samples], dtype=np.int32)
    tokens_N, logprobs_N = (
        np.concatenate([getattr(s, name) for s in samples]) for name in ("token_ids", "logprobs")
    )
    uneven = (lengths_B != [len(sample.logprobs) for sample in samples]).any()  # in sum they may be even
    if uneven or _problem(tokens_N, logprobs_N, vocabulary_size):  # all at once; then whose it is
        for group_id, sample_id, sample in zip(group_ids, sample_ids, samples, strict=True):
            _check(sample, (constants["iteration"], group_id, sample_id), vocabulary_size)
    columns = {
        "group_id": group_ids,
        "sample_id": sample_ids,
        "prompt_id": [draws.prompt_ids[group] for group in group_ids],
        "prompt": [draws.texts[group] for group in group_ids],
        "response": _texts(tokenizer, samples),
        "prompt_token_ids": [draws.token_ids[group] for group in group_ids],
        "response_token_ids": _ragged(tokens_N, lengths_B),
        "old_logprobs": _ragged(logprobs_N, lengths_B),
        "response_mask": _ragged(np.ones(len(tokens_N), dtype=bool), lengths_B),
        "finish_reason": [sample.finish_reason for sample in samples],
        "response_tokens": lengths_B,
        "seed": [seed for request in requests for seed in request.seeds],
    }
    columns |= {name: [value] * len(samples) for name, value in constants.items()}
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def _check(sample: Sample, key: tuple[int, int, int], vocabulary_size: int) -> None:
    if problem := _problem(sample.token_ids, sample.logprobs, vocabulary_size):
        raise DataError(f"generate: rollout (iteration, group_id, sample_id) {key}: {problem}")


def _texts(tokenizer: "PreTrainedTokenizerBase", samples: Sequence[Sample]) -> list[str]:
    token_ids = [sample.token_ids.tolist() for sample in samples]
    found: list[str] = tokenizer.batch_decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return found


def _check_counts(requests: Sequence[Request], groups: Sequence[Group], iteration: int) -> None:
    for request, group in zip(requests, groups, strict=True):
        if (found := len(group.samples)) != (wanted := len(request.seeds)):
            where = f"generate: group (iteration, group_id) {(iteration, group.group_id)}"
            raise DataError(f"{where}: the engine gave {found} samples for {wanted} seeds")


def _ragged(values_N: np.ndarray, lengths_B: np.ndarray) -> pa.ListArray:
    """Values of one row after another as a list column; no Python object per token."""
    offsets = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_N))


def _problem(tokens_N: np.ndarray, logprobs_N: np.ndarray, vocabulary_size: int) -> str:
    """What is wrong with sampled tokens and their log-probs, or nothing."""
    if len(logprobs_N) != len(tokens_N):
        return f"{len(logprobs_N)} log-probs for {len(tokens_N)} tokens"
    if len(tokens_N) == 0:
        return ""
    # NaN passes through min and max, and then no comparison with it holds.
    if not -np.inf < logprobs_N.min() <= logprobs_N.max() <= 0:
        return "a log-prob is not finite or above 0"
    if not 0 <= tokens_N.min() <= tokens_N.max() < vocabulary_size:
        return f"a token id outside the vocabulary of {vocabulary_size}"
    return ""


def shard_numbers(groups: Sequence[Group]) -> dict[str, Any]:
    """What a shard adds to the summary of its output."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "response_tokens": sum(len(sample.token_ids) for sample in samples),
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
    }
