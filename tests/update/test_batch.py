import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import tables
from grpo.errors import CorruptError
from grpo.update.batch import Rollouts, gather, kept_rollouts, micro_batches, minibatches


def keys_of(group_sizes: list[int], iteration: int = 0) -> np.ndarray:
    """Keys of groups 0, 1, ... of the given sizes."""
    return np.array(
        [[iteration, g, s] for g, size in enumerate(group_sizes) for s in range(size)], dtype=np.int64
    ).reshape(-1, 3)


def make_rollouts(shapes: list[tuple[int, list[bool]]]) -> Rollouts:
    """One rollout per (prompt tokens, mask); every token id is different: 100 * row + position."""
    ids = [np.arange(p + len(mask)) + 100 * i for i, (p, mask) in enumerate(shapes)]
    masks = [np.array(mask) for _, mask in shapes]
    return Rollouts(
        keys=keys_of([1] * len(shapes)),
        prompts=[row[:p] for row, (p, _) in zip(ids, shapes, strict=True)],
        responses=[row[p:] for row, (p, _) in zip(ids, shapes, strict=True)],
        masks=masks,
        old_logprobs=[np.full(mask.sum(), -1.0, dtype=np.float32) for mask in masks],
        advantages=np.arange(len(shapes), dtype=np.float64),
        temperatures=0.5 + np.arange(len(shapes)) / 4,
    )


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


# ---- micro-batches ----

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.booleans(), min_size=1, max_size=9).map(lambda m: [True, *m])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=shapes, max_tokens=st.integers(1, 80))
def test_micro_batches_cover_each_row_once_within_the_budget(
    data: Any, shape: list[tuple[int, list[bool]]], max_tokens: int
) -> None:
    rollouts = make_rollouts(shape)
    rows = np.array(data.draw(st.permutations(range(len(rollouts)))), dtype=np.int64)
    batches = micro_batches(rollouts, rows, max_tokens, "cpu")
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(len(rollouts)))
    widths = [batch.input_ids_BL.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch in batches:
        assert len(batch.rows) == 1 or batch.input_ids_BL.numel() <= max_tokens
        lengths = [len(rollouts.prompts[i]) + len(rollouts.responses[i]) for i in batch.rows]
        assert batch.input_ids_BL.shape == (len(batch.rows), max(lengths))
        for b, i in enumerate(batch.rows):
            whole = [*rollouts.prompts[i], *rollouts.responses[i]]
            assert batch.input_ids_BL[b, : lengths[b]].tolist() == whole
        expected = [rollouts.responses[i][rollouts.masks[i]] for i in batch.rows]
        assert batch.targets_N.tolist() == np.concatenate(expected).tolist()
        assert batch.lengths_B.tolist() == [len(tokens) for tokens in expected]
        # The ids of a row count up, so the token that predicts is the one before.
        assert (batch.input_ids_BL[batch.rows_N, batch.columns_N] + 1).tolist() == batch.targets_N.tolist()
        assert batch.temperature_N.tolist() == [
            rollouts.temperatures[i] for i, tokens in zip(batch.rows, expected, strict=True) for _ in tokens
        ]


def test_a_micro_batch_by_hand() -> None:
    rollouts = make_rollouts([(2, [True]), (1, [True, False, True])])
    [batch] = micro_batches(rollouts, np.array([0, 1]), 100, "cpu")
    # The longer row comes first; row 0 is 0 1 | 2, row 1 is 100 | 101 (102) 103.
    assert batch.rows.tolist() == [1, 0]
    assert batch.input_ids_BL[0].tolist() == [100, 101, 102, 103]
    assert batch.input_ids_BL[1, :3].tolist() == [0, 1, 2]
    assert batch.rows_N.tolist() == [0, 0, 1]
    assert batch.columns_N.tolist() == [0, 2, 1]
    assert batch.targets_N.tolist() == [101, 103, 2]
    assert batch.lengths_B.tolist() == [2, 1]
    assert batch.temperature_N.tolist() == [0.75, 0.75, 0.5]


def test_a_rollout_longer_than_the_budget_goes_alone() -> None:
    rollouts = make_rollouts([(5, [True] * 5), (2, [True]), (2, [True])])
    batches = micro_batches(rollouts, np.arange(3), 6, "cpu")
    assert [batch.rows.tolist() for batch in batches] == [[0], [1, 2]]


def test_gather() -> None:
    values = [np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0, 5.0])]
    found = gather(values, np.array([2, 0]), "cpu")
    assert found.tolist() == [4, 5, 1, 2]
    assert found.dtype == torch.float32


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


KEYS = [(0, 0, 0), (0, 0, 1), (0, 1, 0)]


def test_kept_rollouts() -> None:
    found = kept_rollouts(rollouts_table(KEYS), advantages_table(KEYS, [None, 0.5, -0.25]))
    assert len(found) == 2
    assert found.keys.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert [row.tolist() for row in found.prompts] == [[11], [12]]
    assert [row.tolist() for row in found.responses] == [[21, 22, 23], [22, 23, 24]]
    assert [row.tolist() for row in found.masks] == [[True, False, True], [True, True, True]]
    # One log-prob per token that counts.
    assert [row.tolist() for row in found.old_logprobs] == [[-1.25, -1.75], [-2.25, -2.5, -2.75]]
    assert found.advantages.tolist() == [0.5, -0.25]
    assert found.temperatures.tolist() == [2.0, 3.0]
    assert found.num_tokens.tolist() == [2, 3]


def test_kept_rollouts_of_tables_in_several_chunks() -> None:
    rollouts, advantages = rollouts_table(KEYS), advantages_table(KEYS, [1.0, None, 2.0])
    found = kept_rollouts(
        pa.concat_tables([rollouts.slice(0, 2), rollouts.slice(2)]),
        pa.concat_tables([advantages.slice(0, 1), advantages.slice(1)]),
    )
    assert [row.tolist() for row in found.responses] == [[20, 21, 22], [22, 23, 24]]
    assert found.advantages.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("keys", [[], KEYS])
def test_nothing_kept(keys: list[tuple[int, int, int]]) -> None:
    found = kept_rollouts(rollouts_table(keys), advantages_table(keys, [None] * len(keys)))
    assert len(found) == 0
    assert found.keys.shape == (0, 3)
    assert found.num_tokens.tolist() == []
    assert found.responses == []


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


def test_the_numbers_of_a_budget() -> None:
    # 7 rollouts of 3 tokens in a budget of 10: 3 + 3 + 1
    rollouts = make_rollouts([(2, [True])] * 7)
    batches = micro_batches(rollouts, np.arange(7), 10, "cpu")
    assert [len(batch.rows) for batch in batches] == [3, 3, 1]
    assert math.prod(batches[0].input_ids_BL.shape) == 9
