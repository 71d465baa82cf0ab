from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from grpo import tables
from grpo.errors import CorruptError
from grpo.update.batch import (
    Rollouts,
    Rows,
    gather,
    kept_rollouts,
    made_up_pair,
    minibatches,
    room_for,
)
from grpo.update.layout import longest_pair


def keys_of(group_sizes: list[int], iteration: int = 0) -> np.ndarray:
    """Keys of groups 0, 1, ... of the given sizes."""
    return np.array(
        [[iteration, g, s] for g, size in enumerate(group_sizes) for s in range(size)], dtype=np.int64
    ).reshape(-1, 3)


# ---- minibatches ----


def test_one_step_takes_every_row_in_order() -> None:
    [rows] = minibatches(keys_of([2, 1, 3]), 1, seed=0, iteration=0, epoch=0)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 50])
def test_steps_are_whole_groups_in_counts_that_differ_by_at_most_one(num_steps: int) -> None:
    sizes = [4, 1, 3, 2, 4, 4, 2]
    keys = keys_of(sizes)
    steps = minibatches(keys, num_steps, seed=3, iteration=5, epoch=1)
    assert len(steps) == min(num_steps, 7)  # more steps than groups: one group each
    assert sorted(np.concatenate(steps).tolist()) == list(range(20))
    groups_of = [set(keys[rows, 1].tolist()) for rows in steps]
    assert sum(len(groups) for groups in groups_of) == 7  # no group in two steps
    counts = [len(groups) for groups in groups_of]
    assert max(counts) - min(counts) <= 1
    for rows, groups in zip(steps, groups_of, strict=True):
        assert len(rows) == sum(sizes[group] for group in groups)


def test_groups_of_different_iterations_are_different_groups() -> None:
    keys = np.concatenate([keys_of([2, 2], iteration=0), keys_of([2, 2], iteration=1)])
    steps = minibatches(keys, 4, seed=0, iteration=1, epoch=0)
    assert sorted(rows.tolist() for rows in steps) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_permutation_follows_from_seed_iteration_and_epoch() -> None:
    keys = keys_of([2] * 30)

    def steps(seed: int, iteration: int, epoch: int) -> list[list[int]]:
        return [rows.tolist() for rows in minibatches(keys, 3, seed, iteration, epoch)]

    settings_of = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = [steps(*setting) for setting in settings_of]
    assert [steps(*setting) for setting in settings_of] == found
    assert all(found[i] != found[j] for i in range(4) for j in range(i))
    assert steps(2**63 - 1, 10**6, 10) == steps(2**63 - 1, 10**6, 10)


def test_the_permutation_depends_on_groups_only() -> None:
    def groups(sizes: list[int]) -> list[list[int]]:
        keys = keys_of(sizes)
        return [np.unique(keys[rows, 1]).tolist() for rows in minibatches(keys, 3, 7, 0, 0)]

    assert groups([1] * 9) == groups([4, 2, 1, 3, 1, 1, 2, 5, 1])


def test_nothing_kept_is_one_step_without_rows() -> None:
    steps = minibatches(keys_of([]), 4, seed=0, iteration=0, epoch=0)
    assert [rows.tolist() for rows in steps] == [[]]


def test_gather() -> None:
    values = [np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0, 5.0])]
    found = gather(dict(enumerate(values)), np.array([2, 0]), "cpu")
    assert found.tolist() == [4, 5, 1, 2]
    assert found.dtype == torch.float32


def test_room_for_log_probs_is_one_array() -> None:
    # Small arrays that stay, between large ones that go, would keep the pages of the heap.
    rollouts = made_up_pair(2, 7, vocabulary=11)
    found = room_for(rollouts, np.array([1, 0]))
    assert {row: len(values) for row, values in found.items()} == {1: 7, 0: 1}
    assert found[0].base is found[1].base
    assert room_for(rollouts, np.arange(0)) == {}


# ---- kept rollouts ----


def rollouts_table(keys: list[tuple[int, int, int]]) -> pa.Table:
    rows = [
        {
            **dict(zip(tables.KEY, key, strict=True)),
            "prompt_token_ids": [10 + n],
            "response_token_ids": [20 + n, 21 + n, 22 + n],
            "old_logprobs": [-0.25 - n, -0.5 - n, -0.75 - n],
            "response_mask": [True, n % 2 == 0, True],
            "response_tokens": 3,
            "temperature": 1.0 + n,
            "policy_iteration": n,
        }
        for n, key in enumerate(keys)
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema("rollouts"))


def advantages_table(keys: list[tuple[int, int, int]], values: list[float | None]) -> pa.Table:
    rows = [
        {**dict(zip(tables.KEY, key, strict=True)), "advantage": value, "keep": value is not None}
        for key, value in zip(keys, values, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema("advantages"))


def lists(rows: Rows) -> list[list[float]]:
    return [row.tolist() for row in rows]


KEYS = [(0, 0, 0), (0, 0, 1), (0, 1, 0)]


def test_kept_rollouts() -> None:
    found = kept_rollouts(rollouts_table(KEYS), advantages_table(KEYS, [None, 0.5, -0.25]))
    assert len(found) == 2
    assert found.keys.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert lists(found.prompts) == [[11], [12]]
    assert lists(found.responses) == [[21, 22, 23], [22, 23, 24]]
    assert lists(found.masks) == [[True, False, True], [True, True, True]]
    # One log-prob per token that counts.
    assert lists(found.old_logprobs) == [[-1.25, -1.75], [-2.25, -2.5, -2.75]]
    assert found.advantages.tolist() == [0.5, -0.25]
    assert found.temperatures.tolist() == [2.0, 3.0]
    assert found.num_tokens.tolist() == [2, 3]


def test_kept_rollouts_of_several_shards() -> None:
    rollouts, advantages = rollouts_table(KEYS), advantages_table(KEYS, [1.0, None, 2.0])
    found = kept_rollouts(
        pa.concat_tables([rollouts.slice(0, 2), rollouts.slice(2)]),
        pa.concat_tables([advantages.slice(0, 1), advantages.slice(1)]),
    )
    assert lists(found.responses) == [[20, 21, 22], [22, 23, 24]]
    assert found.advantages.tolist() == [1.0, 2.0]
    assert found.temperatures.tolist() == [1.0, 3.0]


def test_what_an_older_policy_sampled_is_left_out() -> None:
    """Policies 0, 1 and 2 sampled the rows; the one of policy 1 is not kept anyway."""
    rollouts, advantages = rollouts_table(KEYS), advantages_table(KEYS, [1.0, None, 2.0])
    assert kept_rollouts(rollouts, advantages).num_stale == 0
    for oldest, left, num_stale in ((0, [1.0, 2.0], 0), (1, [2.0], 1), (2, [2.0], 1), (3, [], 2)):
        found = kept_rollouts(rollouts, advantages, oldest_policy=oldest)
        assert (found.advantages.tolist(), found.num_stale) == (left, num_stale)


@pytest.mark.parametrize("keys", [[], KEYS])
def test_nothing_kept(keys: list[tuple[int, int, int]]) -> None:
    found = kept_rollouts(rollouts_table(keys), advantages_table(keys, [None] * len(keys)))
    assert len(found) == 0
    assert found.keys.shape == (0, 3)
    assert found.num_tokens.tolist() == []
    assert len(found.responses) == 0


@pytest.mark.parametrize(
    "keys",
    [
        KEYS[:2],
        [*KEYS, (0, 1, 1)],
        [KEYS[0], KEYS[2], KEYS[1]],
        [(0, 0, 0), (0, 0, 1), (0, 1, 1)],
        [(1, 0, 0), (1, 0, 1), (1, 1, 0)],
        [],
    ],
)
def test_other_keys_are_refused(keys: list[tuple[int, int, int]]) -> None:
    message = r"^advantages are not of these rollouts: their keys differ; run `grpo advantage`$"
    with pytest.raises(CorruptError, match=message) as caught:
        kept_rollouts(rollouts_table(KEYS), advantages_table(keys, [1.0] * len(keys)))
    assert caught.value.exit_code == 6


# ---- what the layout is checked on ----


def test_the_longest_pair() -> None:
    # prompt + response: 2 + 3, 2 + 1 | 4 + 2, 4 + 6, 4 + 1 | 9 + 0 is shorter than 10
    prompts, responses = [2, 2, 4, 4, 4, 8], [3, 1, 2, 6, 1, 1]
    rollouts = Rollouts(
        keys=keys_of([2, 3, 1]),
        prompts=[np.zeros(n) for n in prompts],
        responses=[np.zeros(n) for n in responses],
        masks=[np.ones(n, dtype=bool) for n in responses],
        old_logprobs=[np.zeros(n) for n in responses],
        advantages=np.zeros(6),
        temperatures=np.ones(6),
    )
    assert longest_pair(rollouts).tolist() == [4, 3]
    # A tree is of one prompt: row 4 has another one now.
    other = replace(
        rollouts, prompts=[np.full(n, n) if i != 4 else np.ones(n) for i, n in enumerate(prompts)]
    )
    assert longest_pair(other).tolist() == [2, 3]


def test_a_made_up_pair() -> None:
    found = made_up_pair(5, 7, vocabulary=11)
    assert [len(prompt) for prompt in found.prompts] == [5, 5]
    assert found.num_tokens.tolist() == [1, 7]
    assert all(0 <= token < 11 for token in found.responses[1])
    assert found.prompts[0].tolist() == found.prompts[1].tolist()
