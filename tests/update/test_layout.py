"""How rollouts become sequences: every token once, in its place, within the budget."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.update.batch import Rollouts
from grpo.update.layout import (
    PADDING,
    PROMPT,
    Cost,
    Layout,
    MicroBatch,
    build,
    first_fit,
    groups_of,
    plan,
    tree_of,
    trees_of,
)

LAYOUTS: list[Layout] = ["shared", "packed", "rows"]
LINEAR = Cost(per_token=1, per_position=0)


def make_rollouts(groups: list[tuple[int, list[list[bool]]]]) -> Rollouts:
    """Groups of (prompt tokens, mask of each response). All tokens differ; those of prompts are negative."""
    keys: list[list[int]] = []
    prompts: list[np.ndarray] = []
    responses: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for group, (num_prompt, masks_of) in enumerate(groups):
        for sample, mask in enumerate(masks_of):
            keys.append([0, group, sample])
            prompts.append(-1000 * group - 1 - np.arange(num_prompt))
            responses.append(1000 * len(responses) + num_prompt + np.arange(len(mask)))
            masks.append(np.array(mask))
    return Rollouts(
        keys=np.array(keys),
        prompts=prompts,
        responses=responses,
        masks=masks,
        old_logprobs=[np.full(mask.sum(), -1.0, dtype=np.float32) for mask in masks],
        advantages=np.zeros(len(keys)),
        temperatures=0.5 + np.arange(len(keys)) / 4,
    )


def micro_batches(rollouts: Rollouts, *how: Any) -> list[MicroBatch]:
    return [build(rollouts, sequences, "cpu") for sequences in plan(rollouts, *how)]


def plain_groups(shapes: list[tuple[int, list[int]]]) -> Rollouts:
    return make_rollouts([(prompt, [[True] * length for length in lengths]) for prompt, lengths in shapes])


# ---- by hand ----


def test_a_tree_by_hand() -> None:
    rollouts = make_rollouts([(2, [[True], [True, False, True]])])
    batch = build(rollouts, [[tree_of(rollouts, [0, 1])]], "cpu")
    assert batch.input_ids_SL.tolist() == [[-1, -2, 2, 1002, 1003, 1004]]
    assert batch.position_ids_SL.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert batch.branch_SL.tolist() == [[PROMPT, PROMPT, 1, 2, 2, 2]]
    assert batch.tree_SL.tolist() == [[0] * 6]
    # The prompt's last token (1) predicts the first of each response; 1003 (4) predicts 1004; 1003 is masked.
    assert batch.rows.tolist() == [0, 1]
    assert batch.places_N.tolist() == [1, 1, 4]
    assert batch.targets_N.tolist() == [2, 1002, 1004]
    assert batch.lengths_B.tolist() == [1, 2]
    assert batch.temperature_N.tolist() == [0.5, 0.75, 0.75]


def test_two_sequences_by_hand() -> None:
    rollouts = plain_groups([(1, [1]), (1, [1]), (2, [3])])
    first, second, third = (tree_of(rollouts, [row]) for row in range(3))
    batch = build(rollouts, [[third], [first, second]], "cpu")
    assert batch.input_ids_SL.tolist() == [[-2001, -2002, 2002, 2003, 2004], [-1, 1, -1001, 1001, 0]]
    assert batch.position_ids_SL.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    assert batch.tree_SL.tolist() == [[0] * 5, [0, 0, 1, 1, PADDING]]
    assert batch.places_N.tolist() == [1, 2, 3, 5, 7]
    assert batch.targets_N.tolist() == [2002, 2003, 2004, 1, 1001]


def test_first_fit_decreasing_by_hand() -> None:
    rollouts = plain_groups([(1, [n - 1]) for n in (7, 6, 5, 3, 2, 2)])
    trees = [tree_of(rollouts, [row]) for row in range(6)]
    # 7 3 | 6 2 2 | 5 within 10
    sizes = [[tree.num_tokens for tree in sequence] for sequence in first_fit(trees, 10)]
    assert sizes == [[7, 3], [6, 2, 2], [5]]


def test_a_group_larger_than_the_budget_becomes_several_trees() -> None:
    rollouts = plain_groups([(4, [3, 5, 1, 6])])
    # 4 + 6 + 1 would be 11 > 10; longest first 6 | 5 | 3 1, and in a tree the longest is last
    trees = trees_of(rollouts, range(4), max_tokens=10)
    assert [(tree.rows, tree.num_tokens) for tree in trees] == [((3,), 10), ((1,), 9), ((2, 0), 8)]


def test_a_group_with_two_prompts_shares_neither() -> None:
    rollouts = plain_groups([(2, [1, 1, 1])])
    prompts = [rollouts.prompts[0], rollouts.prompts[1] - 1, rollouts.prompts[2]]
    other = Rollouts(**{**vars_of(rollouts), "prompts": prompts})
    assert groups_of(rollouts, np.arange(3)) == [[0, 1, 2]]
    assert groups_of(other, np.arange(3)) == [[0, 2], [1]]


def vars_of(rollouts: Rollouts) -> dict[str, Any]:
    return {name: value for name, value in vars(rollouts).items() if name != "num_tokens"}


# ---- what is cheapest ----


def test_all_responses_of_a_group_are_one_tree() -> None:
    rollouts = plain_groups([(100, [10] * 8)])
    [batch] = plan(rollouts, np.arange(8), 10**6, "shared", LINEAR)
    assert [tree.rows for sequence in batch for tree in sequence] == [(7, 6, 5, 4, 3, 2, 1, 0)]
    [batch] = plan(rollouts, np.arange(8), 10**6, "packed", LINEAR)
    assert {tree.rows for sequence in batch for tree in sequence} == {(row,) for row in range(8)}


def test_more_tokens_at_once_than_are_useful_are_not_put_together_but_in_a_tree() -> None:
    rollouts = plain_groups([(1, [500] * 8), (1, [9]), (1, [9])])
    batches = plan(rollouts, np.arange(10), 10**6, "shared", replace(LINEAR, max_tokens=600))
    # 1 + 8 * 500 = 4001 tokens of one tree alone; then the two of 10.
    assert [sum(tree.num_tokens for tree in sequence) for [sequence] in batches] == [4001, 20]


def test_little_is_padding_where_lengths_differ() -> None:
    lengths = np.random.default_rng(0).integers(8, 129, size=128).tolist()
    rollouts = plain_groups([(8, [length]) for length in lengths])
    tokens = sum(8 + length for length in lengths)
    for layout, waste in (("rows", 0.4), ("packed", 0.03)):
        batches = micro_batches(rollouts, np.arange(128), 4096, layout, Cost(10**6, 1))
        padded = sum(batch.input_ids_SL.numel() for batch in batches)
        assert padded / tokens - 1 <= waste, layout


# ---- for all shapes ----

masks = st.lists(st.booleans(), max_size=8).map(lambda mask: [True, *mask])
groups = st.lists(
    st.tuples(st.integers(1, 9), st.lists(masks, min_size=1, max_size=5)), min_size=1, max_size=6
)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), shape=groups, max_tokens=st.integers(1, 120), per_position=st.sampled_from([0, 1, 100])
)
def test_each_token_is_in_its_place(
    layout: Layout, data: Any, shape: list[tuple[int, list[list[bool]]]], max_tokens: int, per_position: int
) -> None:
    rollouts = make_rollouts(shape)
    rows = np.array(data.draw(st.permutations(range(len(rollouts)))), dtype=np.int64)
    cost = Cost(per_token=10, per_position=per_position)
    batches = micro_batches(rollouts, rows, max_tokens, layout, cost)
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(len(rollouts)))
    widths = [batch.input_ids_SL.shape[1] for batch in batches]
    assert all(a >= b for a, b in pairwise(widths))
    for batch in batches:
        assert len(batch.rows) == 1 or batch.input_ids_SL.numel() <= max_tokens
        check_tokens(rollouts, batch)
        if layout == "rows":
            assert len(batch.input_ids_SL) == len(batch.rows)
        if layout != "shared":
            assert batch.branch_SL.max() == PROMPT + 1


def check_tokens(rollouts: Rollouts, batch: MicroBatch) -> None:
    """Each rollout, read along its branch, is its prompt and its response, at the positions 0, 1, 2 ..."""
    ids, positions = batch.input_ids_SL.numpy(), batch.position_ids_SL.numpy()
    tree, branch = batch.tree_SL.numpy(), batch.branch_SL.numpy()
    ends = np.cumsum(batch.lengths_B.numpy())
    for row, end, length in zip(batch.rows.tolist(), ends, batch.lengths_B.tolist(), strict=True):
        places = batch.places_N.numpy()[end - length : end]
        targets = batch.targets_N.numpy()[end - length : end]
        whole = [*rollouts.prompts[row].tolist(), *rollouts.responses[row].tolist()]
        counted = np.flatnonzero(rollouts.masks[row])
        assert targets.tolist() == rollouts.responses[row][counted].tolist()
        s, last = divmod(int(np.flatnonzero(ids.ravel() == rollouts.responses[row][-1])[0]), ids.shape[1])
        path = (tree[s] == tree[s, last]) & ((branch[s] == PROMPT) | (branch[s] == branch[s, last]))
        assert ids[s, path].tolist() == whole
        assert positions[s, path].tolist() == list(range(len(whole)))
        before = [whole[len(rollouts.prompts[row]) + t - 1] for t in counted]
        assert ids.ravel()[places].tolist() == before
        assert (places // ids.shape[1] == s).all()


@settings(max_examples=40, deadline=None)
@given(shape=groups, world=st.integers(1, 4))
def test_shares_are_all_there_is_and_do_not_overlap(
    shape: list[tuple[int, list[list[bool]]]], world: int
) -> None:
    rollouts = make_rollouts(shape)
    rows = np.arange(len(rollouts))
    shares = [micro_batches(rollouts, rows, 60, "shared", LINEAR, (n, world)) for n in range(world)]
    taken = [row for share in shares for batch in share for row in batch.rows.tolist()]
    assert sorted(taken) == rows.tolist()


def test_nothing_gives_no_micro_batch() -> None:
    rollouts = plain_groups([(1, [1])])
    assert micro_batches(rollouts, np.arange(0), 10, "shared", LINEAR) == []
