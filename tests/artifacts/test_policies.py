"""Which policies are durable, which can be rebuilt and from where, and which are gone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.artifacts import redo

from grpo.artifacts import (
    ADAPTER,
    CHECKPOINT,
    OPTIMIZER,
    POLICY,
    ActiveRun,
    Origin,
    Plan,
    Product,
    Staging,
    can_be_had,
    checkpoint_of,
    discard,
    durable_policies,
    held_part,
    is_durable,
    newest_policy,
    origin_of,
)
from grpo.errors import CorruptError, InputError


def again(run: ActiveRun) -> ActiveRun:
    """The same run as another process would open it: nothing is known to be verified."""
    return ActiveRun(run.root, run.config, run.imports, run.console)


def test_a_policy_is_rebuilt_from_the_nearest_durable_one_before_it(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 7, on_disk=[2, 5])
    assert (durable_policies(run), newest_policy(run)) == ([0, 2, 5], 7)
    assert [is_durable(run, policy) for policy in range(8)] == [policy in (0, 2, 5) for policy in range(8)]
    durable = [0, 0, 2, 2, 2, 5, 5, 5]
    assert [origin_of(run, policy) for policy in range(8)] == [
        Origin(policy, at) for policy, at in enumerate(durable)
    ]
    assert [origin_of(run, policy).updates for policy in range(8)] == [0, 1, 0, 1, 2, 0, 1, 2]
    with pytest.raises(InputError) as caught:
        origin_of(run, 8)
    place = run.path / "iteration=000007" / "update"
    assert str(caught.value) == f"{place}: missing; run `grpo update --iteration 7` first"
    assert not can_be_had(run, 8)


def test_before_the_first_update_there_is_policy_0(tmp_path: Path) -> None:
    run = redo.empty_run(tmp_path)
    redo.commit_start(run)
    assert (durable_policies(run), newest_policy(run), origin_of(run, 0)) == ([0], 0, Origin(0, 0))


def test_without_its_update_a_policy_is_none(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 2, on_disk=[2])
    discard(run, run.folder("update", 1))
    assert (durable_policies(run), newest_policy(run)) == ([0], 1)


def test_a_policy_whose_inputs_were_replaced_is_gone(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 6, on_disk=[4])
    redo.commit_update(run, 1, advantages="B")  # policies 2 and 3 came from another policy 2, or are another
    assert [can_be_had(run, policy) for policy in range(7)] == [True, True, True, False, True, True, True]
    with pytest.raises(InputError) as caught:
        origin_of(run, 3)
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        "policy 3 is not on disk, and cannot be rebuilt: update 2 was made from another policy@2 than the one"
        " that is there; `grpo run --from 2` makes another"
    )
    assert origin_of(run, 6) == Origin(6, 4)  # from there on, nothing that was replaced is read


def lose_execution(run: ActiveRun) -> None:
    manifest = run.require("update", 1, "")
    discard(run, run.folder("update", 1))
    plan = Plan("update", 1, "update", 1, {}, manifest.inputs)
    Staging(run, plan, 0).commit(Product(manifest.ids, [], manifest.summary))


def lose_digest(run: ActiveRun) -> None:
    manifest = run.require("update", 1, "")
    discard(run, run.folder("update", 1))
    plan = Plan("update", 1, "update", 1, {}, manifest.inputs)
    Staging(run, plan, 0).commit(Product(manifest.ids, [], {}, manifest.execution))


@pytest.mark.parametrize("lose", [lose_execution, lose_digest])
def test_an_update_without_a_record_of_how_it_was_done_is_not_done_again(
    tmp_path: Path, lose: Callable[[ActiveRun], None]
) -> None:
    run = redo.trained(tmp_path, 3, on_disk=[])
    lose(run)
    with pytest.raises(InputError, match=r"update 1 has no record of its execution .*`grpo run --from 1`"):
        origin_of(run, 3)
    assert can_be_had(run, 1)


def test_a_checkpoint_of_another_policy_than_its_update_made_is_none(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 3, on_disk=[2, 3])
    redo.commit_update(run, 1, advantages="B")
    assert durable_policies(run) == [0, 3]
    assert checkpoint_of(run, 2) is None
    assert origin_of(run, 2) == Origin(2, 0)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 3, on_disk=[1, 2])
    (run.folder(CHECKPOINT, 1) / "manifest.json").write_text("{")
    assert origin_of(run, 3) == Origin(3, 1)
    with pytest.raises(CorruptError):
        durable_policies(run)  # what lists them all does not pass over it


def test_a_part_is_held_verified_or_not_at_all(tmp_path: Path) -> None:
    run = redo.trained(tmp_path, 3, on_disk=[2])
    redo.commit_checkpoint(run, 3, (ADAPTER, OPTIMIZER))
    place = run.folder(CHECKPOINT, 1)
    assert held_part(run, 1, POLICY) is None
    assert held_part(run, 2, POLICY) == place / "policy"
    assert held_part(run, 2, OPTIMIZER) == place / "optimizer"
    assert (held_part(run, 2, ADAPTER), held_part(run, 3, POLICY)) == (None, None)
    assert held_part(run, 3, ADAPTER) == run.folder(CHECKPOINT, 2) / "adapter"
    path = place / "policy" / "model.safetensors"
    path.write_bytes(b"3")
    with pytest.raises(CorruptError, match="content changed since it was committed"):
        held_part(again(run), 2, POLICY)
    assert held_part(again(run), 2, OPTIMIZER) == place / "optimizer"  # that part is as it was
    path.unlink()
    with pytest.raises(CorruptError, match="missing, though its manifest lists it"):
        held_part(again(run), 2, POLICY)
