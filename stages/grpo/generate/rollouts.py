"""rollouts: the groups of a shard -> rows of `rollouts`, checked. B samples of the shard, N tokens of all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import digest
from grpo.errors import DataError
from grpo.generate.engines.protocol import Group, Request, Sampling
from grpo.prompts.source import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingTask:
    """What is to be sampled of a policy: the rollouts of its iteration, or those it is evaluated by."""

    table: str  # rollouts, or eval_rollouts
    iteration: int  # of the rollouts; of an evaluation, the policy's
    policy: int
    rows: dict[int, Row]  # of `prompts`, by group_id
    texts: dict[int, str]  # the prompts as the model sees them, by group_id
    requests: dict[int, Request]  # by group_id
    shards: dict[str, range]  # the file of each -> its groups
    groups_per_round: int
    sampling: Sampling
    by_query: int | None = None  # groups whose prompt generate.prompts_sql gave; None: there is no query

    def part(self, name: str) -> "SamplingTask":
        """The task of one shard alone."""
        groups = self.shards[name]
        return replace(
            self,
            rows={group: self.rows[group] for group in groups},
            texts={group: self.texts[group] for group in groups},
            requests={group: self.requests[group] for group in groups},
            shards={name: groups},
        )

    def digest_of(self, groups: range) -> str:
        """Digest of the prompts of some groups."""
        return digest([self.rows[group]["prompt_id"] for group in groups])


class Made(NamedTuple):
    """A shard as it is committed: a Parquet file, its rows, and what its record says of them."""

    content: bytes
    rows: int
    labels: dict[str, Any]


def make_shard(
    task: SamplingTask,
    shard: range,
    groups: Sequence[Group],
    tokenizer: "PreTrainedTokenizerBase",
    vocabulary_size: int,
) -> Made:
    """A shard of its groups, which are in order. A function of these alone: any process may make it.

    Raises DataError as rollouts_table().
    """
    data = rollouts_table(task, groups, tokenizer, vocabulary_size)
    labels: dict[str, Any] = {
        "response_tokens": sum(data["response_tokens"].to_pylist()),
        "truncated": data["finish_reason"].to_pylist().count("length"),
    }
    if task.by_query is not None:
        labels["prompts"] = task.digest_of(shard)
    return Made(tables.encode(data), len(data), labels)


def rollouts_table(
    task: SamplingTask, groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int
) -> pa.Table:
    """One shard, a row per sample in key order. Raises DataError (exit 3) for what no learner could trust."""
    requests = [task.requests[group.group_id] for group in groups]
    _check_counts(task, groups)
    samples = [sample for group in groups for sample in group.samples]
    group_ids = [request.group_id for request in requests for _ in request.seeds]
    sample_ids = [number for request in requests for number in range(len(request.seeds))]
    lengths_B = np.array([len(sample.token_ids) for sample in samples], dtype=np.int32)
    tokens_N = np.concatenate([sample.token_ids for sample in samples])
    logprobs_N = np.concatenate([sample.logprobs for sample in samples])
    uneven = (lengths_B != [len(sample.logprobs) for sample in samples]).any()  # in sum they may be even
    if uneven or _problem(tokens_N, logprobs_N, vocabulary_size):  # all at once; then whose it is
        for *key, sample in zip(group_ids, sample_ids, samples, strict=True):
            if problem := _problem(sample.token_ids, sample.logprobs, vocabulary_size):
                where = f"rollout (iteration, group_id, sample_id) {(task.iteration, *key)}"
                raise DataError(f"generate: {where}: {problem}")
    ids, rows = [sample.token_ids.tolist() for sample in samples], len(samples)
    columns = {
        "iteration": [task.iteration] * rows,
        "policy_iteration": [task.policy] * rows,
        "round": [group_ids[0] // task.groups_per_round] * rows,
        "temperature": [task.sampling.temperature] * rows,
        "group_id": group_ids,
        "sample_id": sample_ids,
        "prompt_id": [task.rows[group]["prompt_id"] for group in group_ids],
        "prompt": [task.texts[group] for group in group_ids],
        "response": tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "prompt_token_ids": [task.requests[group].prompt_token_ids for group in group_ids],
        "response_token_ids": _ragged(tokens_N, lengths_B),
        "old_logprobs": _ragged(logprobs_N, lengths_B),
        "response_mask": _ragged(np.ones(len(tokens_N), dtype=bool), lengths_B),
        "finish_reason": [sample.finish_reason for sample in samples],
        "response_tokens": lengths_B,
        "seed": [seed for request in requests for seed in request.seeds],
    }
    return pa.table(columns, schema=tables.schema("rollouts"))


def _check_counts(task: SamplingTask, groups: Sequence[Group]) -> None:
    for group in groups:
        if (found := len(group.samples)) != (wanted := len(task.requests[group.group_id].seeds)):
            where = f"generate: group (iteration, group_id) {(task.iteration, group.group_id)}"
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
