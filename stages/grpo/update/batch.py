"""batch: which rollouts an iteration trains on, and which of them each optimiser step reads.

Steps are made of whole groups and decided by (seed, iteration, epoch) alone. Tokens and log-probs are in
memory, without padding: about 9 bytes a token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from grpo.errors import CorruptError
from grpo.tables import KEY

# Columns of `rollouts` that training needs.
READ = [
    *KEY,
    "prompt_token_ids",
    "response_token_ids",
    "response_mask",
    "old_logprobs",
    "temperature",
]
_OTHER_KEYS = "advantages are not of these rollouts: their keys differ; run `grpo advantage`"

Rows = Sequence[np.ndarray]


@dataclass(frozen=True)
class Rollouts:
    """The kept rollouts of an iteration in key order; `responses[i]` belongs to `keys[i]`.

    keys: int64 [B, 3] (iteration, group_id, sample_id); prompts, responses: token ids per rollout; masks:
    bool per response token, true where the policy sampled it; old_logprobs: float32, one per true of the
    mask; advantages: float64 [B]; temperatures: float64 [B]; num_tokens: T_i, response tokens that count,
    int64 [B].
    """

    keys: np.ndarray
    prompts: Rows
    responses: Rows
    masks: Rows
    old_logprobs: Rows
    advantages: np.ndarray
    temperatures: np.ndarray
    num_tokens: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        counts = [int(mask.sum()) for mask in self.masks]
        object.__setattr__(self, "num_tokens", np.array(counts, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.keys)


def kept_rollouts(shards: Iterable[pa.Table], advantages: pa.Table) -> Rollouts:
    """Join what was sampled, shard by shard, with what is trained on.

    Raises CorruptError (exit 6) when the keys do not match.
    """
    prompts: list[np.ndarray] = []
    responses: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    old_logprobs: list[np.ndarray] = []
    temperatures = [np.zeros(0)]
    start = 0
    for shard in shards:
        mine = advantages.slice(start, len(shard))
        start += len(shard)
        if not _same_keys(shard, mine):
            raise CorruptError(_OTHER_KEYS)
        kept = shard.filter(mine["keep"])
        prompts += _lists(kept["prompt_token_ids"])
        responses += _lists(kept["response_token_ids"])
        own_masks = _lists(kept["response_mask"])
        pairs = zip(_lists(kept["old_logprobs"]), own_masks, strict=True)
        old_logprobs += [old_T[mask_T] for old_T, mask_T in pairs]
        masks += own_masks
        temperatures.append(kept["temperature"].to_numpy())
    if start != len(advantages):
        raise CorruptError(_OTHER_KEYS)
    kept = advantages.filter(advantages["keep"])
    return Rollouts(
        keys=np.stack([kept[name].to_numpy() for name in KEY], axis=1).astype(np.int64),
        prompts=prompts,
        responses=responses,
        masks=masks,
        old_logprobs=old_logprobs,
        advantages=kept["advantage"].to_numpy(),
        temperatures=np.concatenate(temperatures),
    )


def _same_keys(rollouts: pa.Table, advantages: pa.Table) -> bool:
    return len(rollouts) == len(advantages) and all(
        rollouts[name].combine_chunks().equals(advantages[name].combine_chunks()) for name in KEY
    )


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a list column, as views of its values."""
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False)  # booleans are bits there
    ends = np.cumsum(pc.list_value_length(array).to_numpy(zero_copy_only=False), dtype=np.int64)
    return [values[start:end] for start, end in pairwise([0, *ends.tolist()])]


def minibatches(keys: np.ndarray, num_steps: int, seed: int, iteration: int, epoch: int) -> list[np.ndarray]:
    """Rows of each optimiser step of an epoch, int64; whole groups, group counts differing by at most one.

    More steps than groups gives fewer steps. No rows give one step with none, so that it is reported.
    """
    if len(keys) == 0:
        return [np.zeros(0, dtype=np.int64)]
    groups, group_of_row = np.unique(keys[:, :2], axis=0, return_inverse=True)
    order = np.random.default_rng([seed, iteration, epoch]).permutation(len(groups))
    parts = np.array_split(order, num_minibatches(keys, num_steps))
    return [np.flatnonzero(np.isin(group_of_row, part)) for part in parts]


def num_minibatches(keys: np.ndarray, num_steps: int) -> int:
    """How many of `num_steps` an epoch has: no more than groups, and at least one."""
    return max(1, min(num_steps, len(np.unique(keys[:, :2], axis=0))))


def gather(values: Mapping[int, np.ndarray], rows: np.ndarray, device: str) -> Tensor:
    """Ragged values of `rows`, one after another, as float32 [N]."""
    return torch.from_numpy(np.concatenate([values[int(i)] for i in rows]).astype(np.float32)).to(device)


def room_for(rollouts: Rollouts, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Views for the log-probs of each of `rows`, of one array.

    What each micro-batch leaves behind would be small, between large tensors that are freed: the heap cannot
    give back what is around it (a gigabyte for a million tokens).
    """
    lengths = rollouts.num_tokens[rows]
    parts = np.split(np.empty(lengths.sum(), dtype=np.float32), np.cumsum(lengths)[:-1])
    return dict(zip(rows.tolist(), parts, strict=False))  # without rows, split gives one part


def longest_pair(rollouts: Rollouts) -> np.ndarray:
    """Rows of the shortest and the longest response to the prompt of the longest rollout, in that order.

    Of its group alone; one row where no other is of that group and prompt.
    """
    lengths = np.array([len(response) for response in rollouts.responses])
    prompts = np.array([len(prompt) for prompt in rollouts.prompts])
    longest = int(np.argmax(prompts + lengths))
    others = (rollouts.keys[:, :2] == rollouts.keys[longest, :2]).all(axis=1)
    others[longest] = False
    prompt = rollouts.prompts[longest]
    same = [i for i in np.flatnonzero(others).tolist() if np.array_equal(rollouts.prompts[i], prompt)]
    rows = np.array(same, dtype=np.int64)
    return np.array([*rows[np.argsort(lengths[rows], kind="stable")][:1], longest])


def made_up_pair(prompt_tokens: int, response_tokens: int, vocabulary: int) -> Rollouts:
    """A group of a response of one token and one of `response_tokens`, of random tokens."""
    draw = np.random.default_rng(0)
    lengths = (1, response_tokens)
    prompt = draw.integers(vocabulary, size=prompt_tokens)
    return Rollouts(
        keys=np.array([[0, 0, 0], [0, 0, 1]]),
        prompts=[prompt, prompt],
        responses=[draw.integers(vocabulary, size=length) for length in lengths],
        masks=[np.ones(length, dtype=bool) for length in lengths],
        old_logprobs=[np.full(length, np.nan, dtype=np.float32) for length in lengths],  # nobody sampled it
        advantages=np.zeros(2),
        temperatures=np.ones(2),
    )
