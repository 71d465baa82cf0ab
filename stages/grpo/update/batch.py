"""batch: which rollouts an optimiser step reads, and how they are cut into micro-batches.

Steps are made of whole groups and decided by (seed, iteration, epoch) alone; micro-batches bound memory and
change nothing. Shapes: B rollouts, L tokens of the longest row, N response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Rollouts:
    """The kept rollouts of an iteration in key order; `sequences[i]` belongs to `keys[i]`.

    keys: int64 [B, 3] (iteration, group_id, sample_id); prompts, responses: int64 token ids per rollout;
    masks: bool per response token, true where the policy sampled it; old_logprobs: float32, one per true
    of the mask; advantages: float64 [B]; temperatures: float64 [B].
    """

    keys: np.ndarray
    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    masks: list[np.ndarray]
    old_logprobs: list[np.ndarray]
    advantages: np.ndarray
    temperatures: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> np.ndarray:
        """T_i: response tokens that count, int64 [B]."""
        return np.array([mask.sum() for mask in self.masks], dtype=np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, padded on the right; causal attention never sees the padding.

    rows: int64 [B], positions in Rollouts. input_ids_BL. rows_N, columns_N: where the logits that predict
    the N counted response tokens are. targets_N: those tokens. lengths_B: how many of them each row has.
    """

    rows: np.ndarray
    input_ids_BL: Tensor
    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor
    lengths_B: Tensor
    temperature_N: Tensor


def kept_rollouts(rollouts: pa.Table, advantages: pa.Table) -> Rollouts:
    """Join what was sampled with what is trained on. Raises CorruptError when the keys do not match."""
    same_keys = len(rollouts) == len(advantages) and all(
        rollouts[name].combine_chunks().equals(advantages[name].combine_chunks()) for name in KEY
    )
    if not same_keys:
        raise CorruptError("advantages are not of these rollouts: their keys differ; run `grpo advantage`")
    kept = rollouts.filter(advantages["keep"])
    masks = _lists(kept["response_mask"])
    old = _lists(kept["old_logprobs"])
    return Rollouts(
        keys=np.stack([kept[name].to_numpy() for name in KEY], axis=1).astype(np.int64),
        prompts=[ids.astype(np.int64) for ids in _lists(kept["prompt_token_ids"])],
        responses=[ids.astype(np.int64) for ids in _lists(kept["response_token_ids"])],
        masks=masks,
        old_logprobs=[values[mask] for values, mask in zip(old, masks, strict=True)],
        advantages=pc.drop_null(advantages["advantage"]).to_numpy(),
        temperatures=kept["temperature"].to_numpy(),
    )


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(pc.list_value_length(array).to_numpy(zero_copy_only=False))
    return np.split(values, ends[:-1]) if len(array) else []


def minibatches(keys: np.ndarray, num_steps: int, seed: int, iteration: int, epoch: int) -> list[np.ndarray]:
    """Rows of each optimiser step of an epoch, int64; whole groups, group counts differing by at most one.

    More steps than groups gives fewer steps. No rows give one step with none, so that it is reported.
    """
    if len(keys) == 0:
        return [np.zeros(0, dtype=np.int64)]
    groups, group_of_row = np.unique(keys[:, :2], axis=0, return_inverse=True)
    order = np.random.default_rng([seed, iteration, epoch]).permutation(len(groups))
    parts = np.array_split(order, min(num_steps, len(groups)))
    return [np.flatnonzero(np.isin(group_of_row, part)) for part in parts]


def micro_batches(rollouts: Rollouts, rows: np.ndarray, max_tokens: int, device: str) -> list[MicroBatch]:
    """Cut `rows` into batches of at most `max_tokens` padded tokens (one rollout may exceed it alone).

    Sorted by length, longest first, so that little is padding and memory runs out at once or never.
    """
    lengths = np.array([len(rollouts.prompts[i]) + len(rollouts.responses[i]) for i in rows], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches: list[MicroBatch] = []
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        count = max(1, max_tokens // width)
        chosen = rows[order[start : start + count]]
        batches.append(_pad(rollouts, chosen, width, device))
        start += count
    return batches


def _pad(rollouts: Rollouts, rows: np.ndarray, width: int, device: str) -> MicroBatch:
    input_ids_BL = np.zeros(
        (len(rows), width), dtype=np.int64
    )  # any id will do for padding: nothing reads it
    places: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for b, i in enumerate(rows):
        prompt, response = rollouts.prompts[i], rollouts.responses[i]
        input_ids_BL[b, : len(prompt) + len(response)] = np.concatenate([prompt, response])
        counted = np.flatnonzero(rollouts.masks[i])
        columns = len(prompt) - 1 + counted  # the token before predicts it
        places.append((np.full(len(counted), b), columns, response[counted]))
    rows_N, columns_N, targets_N = (np.concatenate(part) for part in zip(*places, strict=True))
    lengths_B = rollouts.num_tokens[rows]
    temperature_N = np.repeat(rollouts.temperatures[rows], lengths_B)
    return MicroBatch(
        rows=rows,
        input_ids_BL=torch.from_numpy(input_ids_BL).to(device),
        rows_N=torch.from_numpy(rows_N).to(device),
        columns_N=torch.from_numpy(columns_N).to(device),
        targets_N=torch.from_numpy(targets_N).to(device),
        lengths_B=torch.from_numpy(lengths_B).to(device),
        temperature_N=torch.from_numpy(temperature_N).float().to(device),
    )


def gather(values: Sequence[np.ndarray] | Mapping[int, np.ndarray], rows: np.ndarray, device: str) -> Tensor:
    """Ragged values of `rows`, one after another, as float32 [N]."""
    return torch.from_numpy(np.concatenate([values[int(i)] for i in rows]).astype(np.float32)).to(device)
