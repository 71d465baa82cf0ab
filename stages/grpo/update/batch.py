"""batch: which rollouts an iteration trains on, and which of them each optimiser step reads.

Steps are made of whole groups and decided by (seed, iteration, epoch) alone. Tokens and log-probs are in
memory, without padding: about 9 bytes a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from grpo.artifacts import ActiveRun, Run, read_rollouts
from grpo.errors import CorruptError, InputError
from grpo.tables import KEY
from grpo.update.plan import iterations_of

_TOKENS = ("prompt_token_ids", "response_token_ids", "response_mask", "old_logprobs")
READ = [*KEY, *_TOKENS, "response_tokens", "temperature"]  # columns of `rollouts` that training needs
Rows = Sequence[np.ndarray]


@dataclass(frozen=True)
class Rollouts:
    """The kept rollouts of an iteration in key order; `responses[i]` belongs to `keys[i]`."""

    keys: np.ndarray  # int64 [B, 3]: iteration, group_id, sample_id
    prompts: Rows  # token ids, as of the responses
    responses: Rows
    masks: Rows  # bool per response token, true where the policy sampled it
    old_logprobs: Rows  # float32, one per true of the mask
    advantages: np.ndarray  # float64 [B]
    temperatures: np.ndarray  # float64 [B]
    token_advantages: Rows | None = None  # float32, one per true of the mask, where teachers have a say
    num_stale: int = 0  # kept ones that are no part of it: their policy is older than is allowed

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """T_i, response tokens that count, int64 [B]."""
        return np.array([mask.sum() for mask in self.masks], dtype=np.int64)

    @cached_property
    def group_tokens(self) -> np.ndarray:
        """The same of all rollouts of its group, int64 [B]; a step reads whole groups."""
        group_of_row = np.unique(self.keys[:, :2], axis=0, return_inverse=True)[1]
        return np.bincount(group_of_row, self.num_tokens).astype(np.int64)[group_of_row]

    def advantages_by_token(self, rows: np.ndarray) -> np.ndarray:
        """The advantage of each token that counts, one of `rows` after another, [N]."""
        if self.token_advantages is None:
            return np.repeat(self.advantages[rows], self.num_tokens[rows])
        return np.concatenate([self.token_advantages[row] for row in rows.tolist()])

    def __len__(self) -> int:
        return len(self.keys)


def read_kept(run: ActiveRun, iteration: int, vocabulary_size: int | None = None) -> Rollouts:
    """The kept rollouts of an iteration and of those it replays, in key order. Raises CorruptError (6).

    An older rollout keeps the log-probs that its own policy sampled it with, so its importance ratio is a
    true one, and the advantage that its group gave it.
    """
    numbers, most = iterations_of(run, iteration), run.config.advantage.max_policy_lag
    columns = READ if most is None else [*READ, "policy_iteration"]
    rollouts = pa.concat_tables([read_rollouts(run, number, columns, vocabulary_size) for number in numbers])
    advantages = pa.concat_tables([run.read("advantages", number) for number in numbers])
    oldest = None if most is None else iteration - most
    if not (teachers := run.config.score.teachers):
        return kept_rollouts(rollouts, advantages, oldest_policy=oldest)
    for number, each in product(numbers, teachers):
        if run.id_of(f"teacher/{each.name}@{number}") is None:
            way = f"`grpo score --iteration {number} --force` asks it"
            raise InputError(f"{run.folder('rewards', number)}: without log-probs of {each.name}; {way}")
    found = pa.concat_tables([run.read("teacher_logprobs", number) for number in numbers])
    weights = {each.name: each.weight for each in teachers}
    return kept_rollouts(rollouts, advantages, found, weights, oldest)


def longest(run: ActiveRun, iteration: int) -> tuple[int, int]:
    """Tokens of the run's longest prompt, and the most that a response may have."""
    prompts = run.require("prompts", None, "grpo run")
    responses = (max_new_tokens_of(run, number) for number in iterations_of(run, iteration))
    return int(prompts.summary["longest_prompt_tokens"]), max(responses)


def max_new_tokens_of(run: Run, iteration: int) -> int:
    """What the rollouts of an iteration were sampled with: it may have changed since."""
    rollouts = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    return int(rollouts.config["generate"]["max_new_tokens"])


def kept_rollouts(
    rollouts: pa.Table,
    advantages: pa.Table,
    teacher_logprobs: pa.Table | None = None,
    weights: Mapping[str, float] | None = None,
    oldest_policy: int | None = None,
) -> Rollouts:
    """Join what was sampled with what is trained on, and with what teachers of `weights` think of it.

    oldest_policy: what an older one sampled is left out. Raises CorruptError (exit 6) when the keys differ.
    """
    keys = rollouts.select(list(KEY))
    if not keys.equals(advantages.select(list(KEY))):
        raise CorruptError("advantages are not of these rollouts: their keys differ; run `grpo advantage`")
    trained = advantages.filter(advantages["keep"])["advantage"]
    if not pc.all(pc.fill_null(pc.is_finite(trained), False), min_count=0).as_py():
        raise CorruptError("advantages: one that is kept is not finite; run `grpo advantage`")
    keep = _fresh(advantages["keep"], rollouts, oldest_policy)
    kept = rollouts.append_column("advantage", advantages["advantage"]).filter(keep)
    prompts, responses, masks, old_logprobs = (_lists(kept[name]) for name in _TOKENS)
    found = Rollouts(
        keys=np.stack([kept[name].to_numpy() for name in KEY], axis=1).astype(np.int64),
        prompts=prompts,
        responses=responses,
        masks=masks,
        old_logprobs=[old_T[mask_T] for old_T, mask_T in zip(old_logprobs, masks, strict=True)],
        advantages=kept["advantage"].to_numpy(),
        temperatures=kept["temperature"].to_numpy(),
        num_stale=len(trained) - len(kept),
    )
    if teacher_logprobs is None or not weights:
        return found
    teachers = {}
    for name, weight in weights.items():
        own = teacher_logprobs.filter(pc.equal(teacher_logprobs["name"], name))
        if not keys.equals(own.select(list(KEY))):
            raise CorruptError(f"teacher_logprobs of {name} are not of these rollouts; run `grpo score`")
        teachers[name] = weight, _lists(own.filter(keep)["logprobs"])
    return replace(found, token_advantages=_token_advantages(found, list(teachers.values())))


def _fresh(keep: pa.ChunkedArray, rollouts: pa.Table, oldest_policy: int | None) -> pa.ChunkedArray:
    if oldest_policy is None:
        return keep
    return pc.and_(keep, pc.greater_equal(rollouts["policy_iteration"], oldest_policy))


def _token_advantages(rollouts: Rollouts, teachers: list[tuple[float, Rows]]) -> Rows:
    """A_i + sum over teachers of weight * (teacher's - old log-prob), per token that counts: float32."""
    found = []
    for row, (mask_T, old_N) in enumerate(zip(rollouts.masks, rollouts.old_logprobs, strict=True)):
        gaps = ((weight, logprobs[row][mask_T].astype(np.float64) - old_N) for weight, logprobs in teachers)
        sum_N = sum((weight * gap_N for weight, gap_N in gaps), np.full(len(old_N), rollouts.advantages[row]))
        found.append(sum_N.astype(np.float32))
    return found


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
    parts = np.array_split(order, min(num_steps, len(groups)))
    return [np.flatnonzero(np.isin(group_of_row, part)) for part in parts]


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


def made_up_pair(prompt_tokens: int, response_tokens: int, vocabulary: int) -> Rollouts:
    """A group of a response of one token and one of `response_tokens`, of random tokens."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(vocabulary, size=prompt_tokens)
    responses = [draw.integers(vocabulary, size=length) for length in (1, response_tokens)]
    return Rollouts(
        keys=np.array([[0, 0, 0], [0, 0, 1]]),
        prompts=[prompt, prompt],
        responses=responses,
        masks=[np.ones(len(response), dtype=bool) for response in responses],
        old_logprobs=[np.full(len(response), np.nan) for response in responses],  # nobody sampled it
        advantages=np.zeros(2),
        temperatures=np.ones(2),
    )
