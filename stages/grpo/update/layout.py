"""layout: the rollouts of an optimiser step -> sequences of tokens that go through the model together.

The K responses of a group share their prompt: a tree is one copy of a prompt with responses behind it, each
of which sees the prompt and itself. Trees are packed into sequences, first-fit decreasing, and sequences into
micro-batches. How it is done changes memory and time, never the result but for rounding.

`shared`  trees, for models in which every layer is full attention, which is then told what a token sees:
          used with update.prompt_sharing auto, until Learner.check_layout finds a difference.
`packed`  rollouts one behind another; position_ids that begin anew tell the model where, and it makes its own
          masks, so windows and chunks are respected.
`rows`    one rollout a sequence, padded on the right: right for every causal model.

Shapes: B rollouts, S sequences, L tokens of the longest, N counted response tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from grpo.update.batch import Rollouts
from grpo.update.tree_attention import Place

Layout = Literal["shared", "packed", "rows"]
PROMPT, PADDING = 0, -1  # branch of a prompt's tokens; tree of padding


@dataclass(frozen=True)
class Cost:
    """Relative cost of a forward pass: of a token, and of each position that its attention computes.

    per_position 0: attention computes only what is seen. max_tokens: more at once are no faster, so that only
    a tree may be larger.
    """

    per_token: float
    per_position: float
    max_tokens: int = 2**31


@dataclass(frozen=True)
class Tree:
    """Rollouts of one group behind one copy of their prompt; num_tokens: of them all together."""

    rows: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    rows: int64 [B], positions in Rollouts. input_ids_SL, position_ids_SL; padding has id 0. tree_SL: which
    tree of its sequence a token belongs to, PADDING for none. branch_SL: PROMPT, or 1, 2, ... for the
    responses of a tree. places_N: where, in [S * L], the hidden states are that predict the counted tokens,
    one rollout after another in the order of rows; a prompt's last token predicts the first of each of its
    responses. targets_N: those tokens. lengths_B: how many each rollout has. trees: where each one is.
    """

    rows: np.ndarray
    input_ids_SL: Tensor
    position_ids_SL: Tensor
    tree_SL: Tensor
    branch_SL: Tensor
    places_N: Tensor
    targets_N: Tensor
    lengths_B: Tensor
    temperature_N: Tensor
    trees: list[Place]


def micro_batches(
    rollouts: Rollouts,
    rows: np.ndarray,
    max_tokens: int,
    layout: Layout,
    cost: Cost,
    device: str,
    share: tuple[int, int] = (0, 1),
) -> Iterator[MicroBatch]:
    """Cut `rows` into micro-batches of at most `max_tokens` tokens, padding included, the longest first.

    One rollout may exceed that alone. The longest first, so that memory runs out at once or never.
    share: (n, of): every of-th tree from the n-th on, this process's part of the step.
    """
    for sequences in plan(rollouts, rows, max_tokens, layout, cost, share):
        yield build(rollouts, sequences, device)


def plan(
    rollouts: Rollouts,
    rows: np.ndarray,
    max_tokens: int,
    layout: Layout,
    cost: Cost,
    share: tuple[int, int] = (0, 1),
) -> list[list[list[Tree]]]:
    """The trees of each sequence of each micro-batch: the cheapest of a few ways to pack them.

    Short sequences leave room unused; long ones widen the square that attention under a dense mask computes.
    """
    groups = groups_of(rollouts, rows) if layout == "shared" else [[row] for row in rows.tolist()]
    trees = [tree for group in groups for tree in trees_of(rollouts, group, max_tokens)]
    trees.sort(key=lambda tree: -tree.num_tokens)  # stable
    trees = trees[share[0] :: share[1]]
    ways = []
    at_once = min(max_tokens, cost.max_tokens)
    for capacity in _capacities(trees, at_once) if layout != "rows" else [0]:
        batches = _batches(first_fit(trees, capacity), at_once)
        ways.append((sum(_cost(batch, cost) for batch in batches), batches))
    return min(ways, key=lambda way: way[0])[1]


def groups_of(rollouts: Rollouts, rows: np.ndarray) -> list[list[int]]:
    """`rows` by group, and by prompt: what shares a prompt is decided by its tokens."""
    groups: dict[tuple[int, int, bytes], list[int]] = {}
    for row, (iteration, group, _) in zip(rows.tolist(), rollouts.keys[rows].tolist(), strict=True):
        groups.setdefault((iteration, group, rollouts.prompts[row].tobytes()), []).append(row)
    return list(groups.values())


def trees_of(rollouts: Rollouts, group: Sequence[int], max_tokens: int) -> list[Tree]:
    """One group as trees of at most max_tokens tokens (or of one response).

    Responses are dealt out longest first, so that those of a tree are of like length; in it, the longest is
    last, as far from its prompt as any.
    """
    prompt = len(rollouts.prompts[group[0]])
    dealt: list[list[int]] = [[]]
    used = prompt
    for row in sorted(group, key=lambda row: -len(rollouts.responses[row])):  # stable
        size = len(rollouts.responses[row])
        if dealt[-1] and used + size > max_tokens:
            dealt.append([])
            used = prompt
        dealt[-1].append(row)
        used += size
    return [tree_of(rollouts, list(reversed(rows))) for rows in dealt]


def tree_of(rollouts: Rollouts, rows: Sequence[int]) -> Tree:
    """The tree of `rows`, which share their prompt."""
    num_tokens = len(rollouts.prompts[rows[0]]) + sum(len(rollouts.responses[row]) for row in rows)
    return Tree(tuple(rows), num_tokens)


def first_fit(trees: Sequence[Tree], capacity: int) -> list[list[Tree]]:
    """Pack trees, largest first, into sequences of at most `capacity` tokens (or of one tree)."""
    room = np.empty(len(trees), dtype=np.int64)
    sequences: list[list[Tree]] = []
    for tree in trees:
        fits = room[: len(sequences)] >= tree.num_tokens
        place = int(fits.argmax()) if fits.any() else len(sequences)
        if place == len(sequences):
            sequences.append([])
            room[place] = capacity
        sequences[place].append(tree)
        room[place] -= tree.num_tokens
    return sequences


def build(rollouts: Rollouts, sequences: Sequence[Sequence[Tree]], device: str) -> MicroBatch:
    """The tensors of one micro-batch, on `device`."""
    width = max(map(_length, sequences))
    grid = np.zeros((4, len(sequences), width), dtype=np.int64)  # one array: one transfer to the device
    input_ids_SL, position_ids_SL, tree_SL, branch_SL = grid
    tree_SL[:] = PADDING
    rows, places, targets, trees = [], [], [], []
    for s, sequence in enumerate(sequences):
        end = 0
        for t, tree in enumerate(sequence):
            prompt = rollouts.prompts[tree.rows[0]]
            root, end = end, end + len(prompt)
            input_ids_SL[s, root:end] = prompt
            position_ids_SL[s, root:end] = np.arange(len(prompt))
            branches = []
            for branch, row in enumerate(tree.rows, PROMPT + 1):
                response = rollouts.responses[row]
                start, end = end, end + len(response)
                input_ids_SL[s, start:end] = response
                position_ids_SL[s, start:end] = len(prompt) + np.arange(len(response))
                branch_SL[s, start:end] = branch
                branches.append(slice(start, end))
                counted = np.flatnonzero(rollouts.masks[row])
                before = np.where(counted == 0, root + len(prompt), start + counted) - 1
                rows.append(row)
                places.append(s * width + before)
                targets.append(response[counted])
            tree_SL[s, root:end] = t
            trees.append(Place(s, slice(root, root + len(prompt)), tuple(branches)))
    counted_N = np.concatenate(places), np.concatenate(targets).astype(np.int64)
    return _on_device(rollouts, np.array(rows, dtype=np.int64), grid, counted_N, trees, device)


def _on_device(
    rollouts: Rollouts,
    rows: np.ndarray,
    grid: np.ndarray,
    counted_N: tuple[np.ndarray, np.ndarray],
    trees: list[Place],
    device: str,
) -> MicroBatch:
    """grid: input_ids_SL, position_ids_SL, tree_SL and branch_SL; counted_N: places and targets."""
    lengths_B = rollouts.num_tokens[rows]
    temperature_N = np.repeat(rollouts.temperatures[rows], lengths_B)
    input_ids_SL, position_ids_SL, tree_SL, branch_SL = torch.from_numpy(grid).to(device).unbind()
    places_N, targets_N = (torch.from_numpy(values).to(device) for values in counted_N)
    return MicroBatch(
        rows=rows,
        input_ids_SL=input_ids_SL,
        position_ids_SL=position_ids_SL,
        tree_SL=tree_SL,
        branch_SL=branch_SL,
        places_N=places_N,
        targets_N=targets_N,
        lengths_B=torch.from_numpy(lengths_B).to(device),
        temperature_N=torch.from_numpy(temperature_N).float().to(device),
        trees=trees,
    )


def _capacities(trees: list[Tree], max_tokens: int) -> list[int]:
    """Sequence lengths to try: of the largest tree, its multiples, and all that may go through at once."""
    longest = max((tree.num_tokens for tree in trees), default=0)
    return sorted({min(multiple * longest, max_tokens) for multiple in (1, 2, 4, 8)} | {max_tokens})


def _batches(sequences: list[list[Tree]], max_tokens: int) -> list[list[list[Tree]]]:
    """Cut sequences, longest first, where one more would exceed max_tokens with its padding."""
    batches: list[list[list[Tree]]] = []
    for sequence in sorted(sequences, key=_length, reverse=True):  # stable
        if not batches or (len(batches[-1]) + 1) * _length(batches[-1][0]) > max_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def _length(sequence: Sequence[Tree]) -> int:
    return sum(tree.num_tokens for tree in sequence)


def _cost(batch: list[list[Tree]], cost: Cost) -> float:
    width = _length(batch[0])
    return len(batch) * width * (cost.per_token + cost.per_position * width)
