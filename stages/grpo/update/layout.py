"""layout: the rollouts of an optimiser step -> sequences of tokens that go through the model together.

How it is done changes memory and time, never the result but for rounding.
Shapes: B rollouts, S sequences, L tokens of the longest, N counted response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from grpo.models.batches import batches
from grpo.update.batch import Rollouts
from grpo.update.tree_attention import Place

# shared: trees, for models in which every layer is full attention, which is told what a token sees; used
# with update.prompt_sharing auto, until Learner.check_layout finds a difference. packed: rollouts one behind
# another; position_ids that begin anew tell the model where; it makes its own masks, so windows and chunks
# are respected. rows: one rollout a sequence, padded on the right: right for every causal model.
Layout = Literal["shared", "packed", "rows"]
PROMPT, PADDING = 0, -1  # branch of a prompt's tokens; tree of padding
ByRow = dict[int, np.ndarray]  # float32 [T_i] of some of the rollouts


@dataclass(frozen=True)
class Cost:
    """Relative cost of a forward pass: of a token, and of each position that its attention computes, if more
    than what is seen. max_tokens: more at once are no faster, so that only a tree may be larger; longest: the
    same of a sequence. multiple: sequences come alone, and their lengths are multiples of it; 0: as they are.
    """

    per_token: float
    per_position: float
    max_tokens: int = 2**31
    longest: int = 2**31
    multiple: int = 0

    def of(self, batch: "list[list[Tree]]") -> float:
        """Cost of a micro-batch, longest sequence first."""
        width = _length(batch[0])
        return len(batch) * width * (self.per_token + self.per_position * width)


@dataclass(frozen=True)
class Tree:
    """Rollouts of one group behind one copy of their prompt, each of which sees the prompt and itself."""

    rows: tuple[int, ...]
    num_tokens: int  # of them all together


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    places_N: where, in [S * L], the hidden states are that predict the counted tokens, one rollout after
    another in the order of rows; a prompt's last token predicts the first of each of its responses.
    """

    rows: np.ndarray  # int64 [B], positions in Rollouts
    trees: list[Place]  # where each one is
    input_ids_SL: Tensor  # 0 is padding
    position_ids_SL: Tensor
    tree_SL: Tensor  # which tree of its sequence a token belongs to, PADDING for none
    branch_SL: Tensor  # PROMPT, or 1, 2, ... for the responses of a tree
    places_N: Tensor
    targets_N: Tensor  # the counted tokens
    lengths_B: Tensor  # how many of them each rollout has
    temperature_N: Tensor


def plan(
    rollouts: Rollouts,
    rows: np.ndarray,
    max_tokens: int,
    layout: Layout,
    cost: Cost,
    share: tuple[int, int] = (0, 1),
) -> list[list[list[Tree]]]:
    """The trees of each sequence of each micro-batch: the cheapest of a few ways to pack `rows`.

    A micro-batch has at most `max_tokens` tokens, padding included, or one rollout; the longest comes first,
    so that memory runs out at once or never. share: (n, of): the n-th of shares_of(). Short sequences leave
    room unused; long ones widen the square that attention under a dense mask computes.
    """
    groups = groups_of(rollouts, rows) if layout == "shared" else [[row] for row in rows.tolist()]
    trees = [tree for group in groups for tree in trees_of(rollouts, group, max_tokens)]
    trees = shares_of(sorted(trees, key=lambda tree: -tree.num_tokens), share[1], cost)[share[0]]
    at_once, largest = min(max_tokens, cost.max_tokens), max((tree.num_tokens for tree in trees), default=0)
    if cost.multiple:
        capacity = at_once // cost.multiple * cost.multiple or at_once
        return [[sequence] for sequence in sorted(first_fit(trees, capacity), key=_length, reverse=True)]
    widest = min(at_once, cost.longest)
    capacities = {widest, *(min(multiple * largest, widest) for multiple in (1, 2, 4, 8))}
    ways = []
    for capacity in sorted(capacities) if layout != "rows" else [0]:
        sequences = first_fit(trees, capacity)
        cut = batches(dict(enumerate(map(_length, sequences))), at_once)
        ways.append([[sequences[place] for place in batch] for batch in cut])
    return min(ways, key=lambda way: sum(map(cost.of, way)))


def shares_of(trees: Sequence[Tree], count: int, cost: Cost) -> list[list[Tree]]:
    """`trees`, longest first, dealt out so that the costliest share is nearly as cheap as can be.

    Each goes to the share that has the least so far, the first of equal ones: at most a third more than the
    best there is (Graham 1969, longest processing time first).
    """
    shares: list[list[Tree]] = [[] for _ in range(count)]
    costs = [0.0] * count
    for tree in trees:
        least = costs.index(min(costs))
        shares[least].append(tree)
        costs[least] += cost.of([[tree]])
    return shares


def groups_of(rollouts: Rollouts, rows: np.ndarray) -> list[list[int]]:
    """`rows` by group, and by prompt: what shares a prompt is decided by its tokens."""
    groups: dict[tuple[int, int, bytes], list[int]] = {}
    for row, (iteration, group, _) in zip(rows.tolist(), rollouts.keys[rows].tolist(), strict=True):
        groups.setdefault((iteration, group, rollouts.prompts[row].tobytes()), []).append(row)
    return list(groups.values())


def longest_pair(rollouts: Rollouts) -> np.ndarray:
    """Rows of the shortest and the longest response to the prompt of the longest rollout, in that order.

    Of its group alone; one row where no other is of that group and prompt.
    """
    sizes = [tree_of(rollouts, [row]).num_tokens for row in range(len(rollouts))]
    longest = int(np.argmax(sizes))
    [group] = [rows for rows in groups_of(rollouts, np.arange(len(rollouts))) if longest in rows]
    others = sorted((row for row in group if row != longest), key=lambda row: sizes[row])
    return np.array([*others[:1], longest])


def trees_of(rollouts: Rollouts, group: Sequence[int], max_tokens: int) -> list[Tree]:
    """One group as trees of at most max_tokens tokens (or of one response).

    Responses are dealt out longest first, so that those of a tree are of like length; in it, the longest is
    last, as far from its prompt as any.
    """
    dealt: list[list[int]] = [[]]
    for row in sorted(group, key=lambda row: -len(rollouts.responses[row])):  # stable
        if dealt[-1] and tree_of(rollouts, [row, *dealt[-1]]).num_tokens > max_tokens:
            dealt.append([])
        dealt[-1].insert(0, row)
    return [tree_of(rollouts, rows) for rows in dealt]


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


def _length(sequence: Sequence[Tree]) -> int:
    return sum(tree.num_tokens for tree in sequence)


def build(
    rollouts: Rollouts, sequences: Sequence[Sequence[Tree]], device: str, multiple: int = 0
) -> MicroBatch:
    """The tensors of one micro-batch, on `device`; multiple: as for Cost."""
    rows = np.array([row for sequence in sequences for tree in sequence for row in tree.rows], dtype=np.int64)
    width = max(map(_length, sequences))
    width += -width % multiple if multiple else 0
    grid = np.zeros((4, len(sequences), width), dtype=np.int64)  # one array: one transfer to the device
    input_ids_SL, position_ids_SL, tree_SL, branch_SL = grid
    tree_SL[:] = PADDING
    places, targets, trees = [], [], []
    for s, sequence in enumerate(sequences):
        end = 0
        for t, tree in enumerate(sequence):
            prompt = rollouts.prompts[tree.rows[0]]
            parts = []
            for branch, tokens in enumerate([prompt, *(rollouts.responses[row] for row in tree.rows)]):
                start, end = end, end + len(tokens)
                here = s, slice(start, end)
                input_ids_SL[here] = tokens
                tree_SL[here], branch_SL[here] = t, branch
                position_ids_SL[here] = np.arange(len(tokens)) + (0 if branch == PROMPT else len(prompt))
                parts.append(here[1])
            trees.append(Place(s, parts[0], tuple(parts[1:])))
            for row, part in zip(tree.rows, parts[1:], strict=True):
                counted = np.flatnonzero(rollouts.masks[row])
                before = np.where(counted == 0, parts[0].stop, part.start + counted) - 1
                places.append(s * width + before)
                targets.append(rollouts.responses[row][counted].astype(np.int64))
    lengths = rollouts.num_tokens[rows]
    temperatures = np.repeat(rollouts.temperatures[rows], lengths).astype(np.float32)
    arrays = (grid, np.concatenate(places), np.concatenate(targets), lengths, temperatures)
    grid_4SL, *others = [torch.from_numpy(array).to(device) for array in arrays]
    return MicroBatch(rows, trees, *grid_4SL.unbind(), *others)


def by_row(batch: MicroBatch, values_N: Tensor, room: ByRow) -> ByRow:
    """Copy the values of a micro-batch to the places of its rollouts in `room`; returns those."""
    parts = np.split(values_N.detach().float().cpu().numpy(), np.cumsum(batch.lengths_B.cpu().numpy())[:-1])
    for row, values_T in zip(batch.rows.tolist(), parts, strict=True):
        room[row][:] = values_T
    return {row: room[row] for row in batch.rows.tolist()}
