"""Which checkpoints stay, and that one goes as a whole."""

from pathlib import Path
from typing import Any

import pytest
from tests.artifacts import redo
from tests.artifacts.test_artifacts import killed_at, tree

from grpo.artifacts import (
    CHECKPOINT,
    ActiveRun,
    Plan,
    Staging,
    droppable,
    durable_policies,
    kept,
    origin_of,
    prune,
    prune_known,
)
from grpo.errors import CorruptError


def keeping(run: ActiveRun, reference_every: int | None = None, **checkpoints: Any) -> ActiveRun:
    """The run with another `checkpoints`, and a reference that moves."""
    return redo.empty_run(run.imports, checkpoints=checkpoints, update={"reference_every": reference_every})


@pytest.mark.parametrize(
    ("checkpoints", "moves", "have", "stay"),
    [
        ({}, None, [1, 2, 3], {2, 3}),  # by default, two
        ({"keep_last": 1}, None, [1, 2, 3], {3}),
        ({"keep_last": 2}, None, [4, 9, 17], {9, 17}),  # however far apart
        ({"keep_last": 5}, None, [1, 2], {1, 2}),
        ({"keep_last": None}, None, [1, 2, 3], {1, 2, 3}),
        ({"keep_last": 2, "keep_every": 3}, None, [1, 2, 3, 4, 6, 7, 8], {3, 6, 7, 8}),
        # The reference of policy 7 is 4, that of 8 is 8; of 3, which stays as a multiple, it is 0.
        ({"keep_last": 2, "keep_every": 3}, 4, [1, 2, 3, 4, 6, 7, 8], {3, 4, 6, 7, 8}),
        ({"keep_last": 2}, 4, [1, 2, 3, 4, 5, 6, 7], {4, 6, 7}),
        ({"keep_last": 2}, 1, [1, 2, 3, 4], {3, 4}),
    ],
)
def test_what_stays(
    tmp_path: Path, checkpoints: dict[str, Any], moves: int | None, have: list[int], stay: set[int]
) -> None:
    run = redo.trained(tmp_path, have[-1], have, checkpoints=checkpoints, update={"reference_every": moves})
    assert kept(run, have) & {*have} == stay
    gone = [policy for policy in have if policy not in stay]
    assert droppable(run) == {policy - 1: [run.folder(CHECKPOINT, policy - 1)] for policy in gone}
    prune(run)
    assert durable_policies(run) == [0, *sorted(stay)]
    assert tree(run.trash) == []
    # Tables are never dropped: each of them can be had as before.
    assert [origin_of(run, policy).policy for policy in range(1, have[-1] + 1)] == [*range(1, have[-1] + 1)]


def test_asked_for_a_number_so_many_stay_and_their_references(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 9, [*range(1, 10)], checkpoints={"keep_last": None, "keep_every": 2})
    assert kept(run, [*range(1, 10)], keep_last=1) == {9, 0}
    moved = keeping(run, reference_every=4)
    prune(moved, keep_last=1)
    assert durable_policies(moved) == [0, 8, 9]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "moves"), [(2, 1, None), (2, 3, None), (1, None, 4), (3, 5, 3), (2, 3, 20)]
)
def test_what_goes_behind_a_checkpoint_is_what_a_look_at_all_of_them_would_drop(
    tmp_path: Path, keep_last: int, keep_every: int | None, moves: int | None
) -> None:
    run = redo.trained(tmp_path, 0, [])
    run = keeping(run, moves, keep_last=keep_last, keep_every=keep_every)
    have: list[int] = []
    for iteration in range(16):
        redo.commit_update(run, iteration)
        redo.commit_checkpoint(run, iteration + 1)
        have = prune_known(run, [*have, iteration + 1])
        newest = iteration + 1
        stay = {n for n in range(1, newest + 1) if n > newest - keep_last or n % (keep_every or 99) == 0}
        stay |= {n - n % moves for n in stay} - {0} if moves else set()
        assert [0, *have] == durable_policies(run) == [0, *sorted(stay)]
        assert droppable(run) == {}


@pytest.mark.parametrize(("call", "number"), [("move", 1), ("sync_folder", 1), ("remove", 1), ("remove", 2)])
def test_killed_while_it_prunes_no_half_checkpoint_is_taken_for_one(
    tmp_path: Path, call: str, number: int
) -> None:
    run = redo.trained(tmp_path, 3, [1, 2, 3], checkpoints={"keep_last": 1})
    whole = tree(run.folder(CHECKPOINT, 0))
    with killed_at(call, number):
        prune(run)
    for policy in durable_policies(run)[1:]:  # what is in its place is all there
        assert tree(run.folder(CHECKPOINT, policy - 1)) == whole
    assert 3 in durable_policies(run)
    prune(run)
    assert durable_policies(run) == [0, 3]
    assert tree(run.trash) == []


def test_one_of_a_policy_that_was_made_again_goes(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 3, [2, 3], checkpoints={"keep_last": 5})
    redo.commit_update(run, 1, advantages="B")
    assert droppable(run) == {1: [run.folder(CHECKPOINT, 1)]}


def test_an_unfinished_one_goes_and_a_finished_one_is_left_to_be_moved_in(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 2, [])
    plan = Plan(CHECKPOINT, 1, CHECKPOINT, 1, {}, {"policy@2": run.id_of("policy@2") or ""})
    begun = Staging(run, plan, 0)
    record = begun.write_bytes("policy", "model.safetensors", b"half")
    assert droppable(run) == {1: [begun.folder]}
    with killed_at("move", 1):
        begun.commit(redo.Product({CHECKPOINT: redo.id_of([record])}, [record], {}))
    assert droppable(run) == {}  # complete but for being moved to its place
    other = Staging(run, plan, 1)
    prune(run)
    assert (begun.folder.exists(), other.folder.exists()) == (True, False)


def test_a_half_checkpoint_in_its_place_goes_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 3, [1, 2, 3], checkpoints={"keep_last": 5})
    (run.folder(CHECKPOINT, 0) / "manifest.json").unlink()  # as nothing of ours leaves it
    assert droppable(run) == {0: [run.folder(CHECKPOINT, 0)]}
    damaged = run.folder(CHECKPOINT, 1) / "manifest.json"
    damaged.write_text("{")
    with pytest.raises(CorruptError, match=f"^{damaged}: is not JSON"):
        prune(run)
    assert damaged.exists()
