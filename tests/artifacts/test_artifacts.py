import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from grpo import tables
from grpo.artifacts import (
    ActiveRun,
    FileRecord,
    Manifest,
    Plan,
    Product,
    Run,
    Staging,
    checkpoint_id,
    choose_attempt,
    digest,
    discard,
    files,
    find_run,
    id_of,
    lacking,
    open_run,
    roll_forward,
    seal,
    staged_attempts,
)
from grpo.artifacts.manifest import SCHEMA_VERSION
from grpo.config import Config
from grpo.console import Console
from grpo.errors import CorruptError, InputError, LockedError, ResourceError, UsageError

CONFIG: dict[str, Any] = {
    "run": "r",
    "model": "m",
    "prompts": {"source": "arithmetic"},
    "score": {"rewards": [{"function": "exact_answer"}]},
}
PLAN = Plan("score", 1, "rewards", 0, {"score": {"x": 1}}, {"rollouts@0": "abc"}, {"f": "123"}, [[0, 4]])


@pytest.fixture
def run(tmp_path: Path) -> ActiveRun:
    """A run with nothing in it yet."""
    run = ActiveRun(tmp_path / "artifacts", Config.model_validate(CONFIG), tmp_path, Console(quiet=True))
    files.make_folder(run.path)
    return run


def again(run: ActiveRun) -> ActiveRun:
    """The same run as another process would open it: nothing is known to be verified."""
    return ActiveRun(run.root, run.config, run.imports, run.console)


def rows(group: int, value: float = 1.0) -> pa.Table:
    row = {"iteration": 0, "group_id": group, "sample_id": 0, "name": "a", "value": value, "status": "ok"}
    return pa.Table.from_pylist([row], schema=tables.schema("rewards"))


def stage_two_shards(run: Run, attempt: int = 0, plan: Plan = PLAN, value: float = 1.0) -> Staging:
    staging = Staging(run, plan, attempt)
    for group in range(2):
        staging.write_shard("rewards", staging.file_name("part", group), rows(group, value))
    return staging


def records(staging: Staging) -> list[FileRecord]:
    found = [staging.committed(staging.file_name("part", group)) for group in range(2)]
    return [record for record in found if record is not None]


def commit(run: Run, attempt: int = 0, plan: Plan = PLAN, value: float = 1.0) -> Manifest:
    staging = stage_two_shards(run, attempt, plan, value)
    held = records(staging)
    return staging.commit(Product({"reward/a": id_of(held)}, held, {"failed": 0}))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Killed(Exception):
    """Stands for kill -9: what is on disk at this moment is what the next process finds."""


@contextmanager
def killed_at(call: str, number: int) -> Iterator[None]:
    """The process ends just before its `number`-th call of `files.<call>` in the block."""
    real, calls = getattr(files, call), 0

    def stop(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, call, stop)
        try:
            yield
        except Killed:
            return
    raise AssertionError(f"files.{call} was not called {number} times")


# The commit scheme


def test_a_shard_is_committed_by_its_sidecar(run: Run) -> None:
    staging = Staging(run, PLAN, 0)
    name = staging.file_name("part", 0)
    fingerprint = PLAN.fingerprint(0)
    assert name == f"part-00000-{fingerprint[:8]}.parquet"
    assert staging.folder == run.path / ".staging/iteration=000000" / f"rewards-{fingerprint[:16]}"
    record = staging.write_shard("rewards", name, rows(0), "unit", reward="a")
    content = (staging.folder / name).read_bytes()
    sidecar = json.loads((staging.folder / f"{name}.sidecar.json").read_bytes())["shard"]
    assert sidecar == {
        "name": name,
        "part": "",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": 1,
        "table": "rewards",
        "unit": "unit",
        "labels": {"reward": "a"},
    }
    assert record == FileRecord.model_validate(sidecar)


def test_resume_finds_committed_shards_and_the_commit_removes_leftovers(run: ActiveRun) -> None:
    staging = stage_two_shards(run)
    first, second = (staging.file_name("part", group) for group in range(2))
    (staging.folder / f"{second}.sidecar.json").unlink()  # killed before the sidecar: no shard
    (staging.folder / f"{second}.tmp").write_bytes(b"half")
    (staging.folder / "policy").mkdir()
    (staging.folder / "policy" / "model.safetensors.tmp").write_bytes(b"half")
    resumed = Staging(again(run), PLAN, 0)
    assert resumed.committed(first) == staging.committed(first) is not None
    assert resumed.committed(second) is None
    # They may be another worker's, which is writing them: they stay until the output is complete.
    assert len([path for path in tree(resumed.folder) if path.endswith(".tmp")]) == 2
    assert Staging(again(run), PLAN, 1).committed(first) is None  # another attempt has its own folder
    resumed.write_shard("rewards", second, rows(1))
    resumed.commit(Product({"reward/a": id_of(records(resumed))}, records(resumed), {"failed": 0}))
    assert [path for path in tree(run.path) if path.endswith(".tmp")] == []


def test_a_staged_shard_that_changed_is_refused(run: ActiveRun) -> None:
    staging = stage_two_shards(run)
    path = staging.folder / staging.file_name("part", 1)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError) as caught:
        Staging(again(run), PLAN, 0)
    assert str(caught.value) == f"{path}: content changed since it was committed (sha256 differs)"


def test_a_sidecar_that_is_none_is_refused(run: ActiveRun) -> None:
    staging = stage_two_shards(run)
    path = staging.folder / (staging.file_name("part", 0) + ".sidecar.json")
    path.write_bytes(b"{")
    with pytest.raises(CorruptError) as caught:
        Staging(again(run), PLAN, 0)
    assert str(caught.value) == (
        f"{path}: not a sidecar; `grpo verify --discard` sets it aside, and the work is rerun"
    )


def test_commit_puts_the_output_in_place(run: ActiveRun) -> None:
    manifest = commit(run)
    target = run.folder("rewards", 0)
    first, second = (record.name for record in manifest.files)
    assert tree(target) == ["manifest.json", first, second, "timings.json"]
    assert tree(run.path / ".staging") == []
    found = again(run).manifest("rewards", 0)
    assert found == manifest
    assert (found.stage, found.iteration, found.attempt, found.rows) == ("score", 0, 0, 2)
    assert (found.inputs, found.config, found.user_files) == (PLAN.inputs, PLAN.config, PLAN.user_files)
    assert found.fingerprint == PLAN.fingerprint(0)
    assert again(run).read("rewards", 0)["group_id"].to_pylist() == [0, 1]
    assert again(run).id_of("reward/a@0") == found.ids["reward/a"]
    assert again(run).iterations() == [0]


def test_an_id_is_of_the_content_and_not_of_names(run: Run) -> None:
    before, after = commit(run), commit(run, attempt=1)
    assert before.files[0].name != after.files[0].name
    assert before.ids == after.ids
    assert commit(run, attempt=2, value=0.5).ids != before.ids


def test_commit_replaces_an_output_and_the_old_one_is_in_the_trash(run: ActiveRun) -> None:
    before = commit(run)
    old = tree(run.folder("rewards", 0))
    after = commit(run, attempt=1)
    last = commit(run, attempt=2)
    assert tree(run.trash / "iteration=000000-rewards.0") == old
    assert after.files[0].name in tree(run.trash / "iteration=000000-rewards.1")
    assert again(run).manifest("rewards", 0) == last
    assert before.fingerprint != after.fingerprint != last.fingerprint


def test_a_superseded_attempt_leaves_staging_with_the_commit(run: Run) -> None:
    stage_two_shards(run, attempt=0)
    commit(run, attempt=1)
    assert tree(run.path / ".staging") == []
    assert staged_attempts(run, PLAN) == {}


# Points of commit() where a process can end, in order: before which call, and what a reader sees then.
POINTS = [
    ("write_file", 1, "old"),  # before timings.json
    ("write_file", 2, "old"),  # before manifest.json
    ("remove_file", 1, "old"),  # the manifest is there; so are plan.json and two sidecars
    ("remove_file", 3, "old"),
    ("move", 1, "old"),  # before the old output goes
    ("sync_folder", 4, "none"),  # it is gone; before that staging was synced twice, and the new .trash
    ("move", 2, "none"),  # between the two renames
    ("sync_folder", 6, "new"),  # in place, not yet synced
]


@pytest.mark.parametrize(("call", "number", "seen"), POINTS)
def test_killed_at_any_point_of_a_commit_the_next_process_finishes_it(
    run: ActiveRun, call: str, number: int, seen: str
) -> None:
    before = commit(run)
    staging = stage_two_shards(run, attempt=1, value=0.5)
    held = records(staging)
    with killed_at(call, number):
        staging.commit(Product({"reward/a": id_of(held)}, held, {"failed": 0}))
    found = again(run).manifest("rewards", 0)
    assert {"old": before, "none": None}.get(seen, found) == found
    if found is not None:
        assert again(run).read("rewards", 0)["value"].to_pylist() == (
            [1.0] * 2 if seen == "old" else [0.5] * 2
        )

    for _ in range(2):  # doing it again changes nothing
        roll_forward(again(run))
    if call == "write_file":  # no manifest yet: the shards are kept, and committed by the next try
        assert again(run).manifest("rewards", 0) == before
        assert choose_attempt(run, PLAN, before, force=False) == 1
        resumed = Staging(again(run), PLAN, 1)
        assert records(resumed) == held
        resumed.commit(Product({"reward/a": id_of(held)}, held, {"failed": 0}))
    found = again(run).manifest("rewards", 0)
    assert found is not None
    assert (found.attempt, found.fingerprint, found.files) == (1, PLAN.fingerprint(1), held)
    assert again(run).read("rewards", 0)["value"].to_pylist() == [0.5, 0.5]
    names = [record.name for record in held]
    assert tree(run.folder("rewards", 0)) == ["manifest.json", *names, "timings.json"]
    assert before.files[0].name in tree(run.trash / "iteration=000000-rewards.0")
    assert tree(run.path / ".staging") == []


def test_roll_forward_leaves_unfinished_work_alone(run: ActiveRun) -> None:
    staging = stage_two_shards(run)
    before = tree(staging.folder)
    roll_forward(again(run))
    assert tree(staging.folder) == before
    assert run.manifest("rewards", 0) is None


def test_roll_forward_refuses_a_staged_output_that_lost_a_file(run: ActiveRun) -> None:
    staging = stage_two_shards(run)
    held = records(staging)
    manifest = commit(run)
    folder = staging.folder
    run.folder("rewards", 0).rename(folder)
    (folder / held[1].name).unlink()
    with pytest.raises(CorruptError) as caught:
        roll_forward(again(run))
    assert str(caught.value) == f"{folder / held[1].name}: missing, though its manifest lists it"
    assert manifest.files == held
    assert run.manifest("rewards", 0) is None


def test_a_shard_may_be_a_hard_link(run: ActiveRun) -> None:
    before = commit(run)
    source = run.path_of(before.files[0], "rewards", 0)
    staging = Staging(again(run), PLAN, 1)
    record = staging.link_table(before.files[0], source, staging.file_name("part", 0))
    assert (staging.folder / record.name).stat().st_ino == source.stat().st_ino
    assert record.model_copy(update={"name": before.files[0].name}) == before.files[0]
    assert Staging(again(run), PLAN, 1).committed(record.name) == record


# Fingerprints and attempts


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "generate"},
        {"stage_version": 2},
        {"output": "rollouts"},
        {"iteration": 1},
        {"config": {"score": {"x": 2}}},
        {"config": {"score": {"x": None}}},
        {"inputs": {"rollouts@0": "abd"}},
        {"inputs": {"rollouts@0": "abc", "prompts": ""}},
        {"user_files": {"f": "124"}},
        {"user_files": {}},
        {"shards": [[0, 2], [2, 4]]},
        {"shards": None},
    ],
)
def test_a_fingerprint_changes_with_each_component(change: dict[str, Any]) -> None:
    assert replace(PLAN, **change).fingerprint(0) != PLAN.fingerprint(0)


def test_a_fingerprint_is_the_digest_of_canonical_json() -> None:
    text = (
        '{"attempt":0,"config":{"score":{"x":1}},"inputs":{"rollouts@0":"abc"},"iteration":0,"output":"rewards",'
        '"shards":[[0,4]],"stage":"score","stage_version":1,"user_files":{"f":"123"}}'
    )
    assert PLAN.fingerprint(0) == hashlib.sha256(text.encode()).hexdigest()
    assert PLAN.fingerprint(1) != PLAN.fingerprint(0)
    turned = replace(PLAN, config={"b": 1, "a": 2})
    assert turned.fingerprint(0) == replace(PLAN, config={"a": 2, "b": 1}).fingerprint(0)


def test_differences_name_what_changed(run: Run) -> None:
    manifest = commit(run)
    assert PLAN.differences(manifest) == []
    assert PLAN.same_as(manifest)
    changed = replace(PLAN, stage_version=2, config={"score": {"x": 2}}, user_files={"f": "124"})
    assert changed.differences(manifest) == [
        "score.x: 1 -> 2",
        "f: its file changed",
        "score version: 1 -> 2",
    ]
    recut = replace(PLAN, shards=None)
    assert recut.differences(manifest) == []
    assert not recut.same_as(manifest)


def test_the_first_attempt_is_0_and_an_equal_plan_keeps_it(run: ActiveRun) -> None:
    assert choose_attempt(run, PLAN, None, force=False) == 0
    committed = commit(run)
    assert choose_attempt(run, PLAN, committed, force=False) == 0
    assert committed.fingerprint == PLAN.fingerprint(0)


def test_force_opens_an_attempt_above_any_other_and_a_rerun_finishes_the_newest(run: ActiveRun) -> None:
    committed = commit(run)
    assert choose_attempt(run, PLAN, committed, force=True) == 1
    Staging(run, PLAN, 1)  # and killed
    assert staged_attempts(run, PLAN) == {1: PLAN.fingerprint(1)}
    assert choose_attempt(run, PLAN, committed, force=False) == 1
    assert choose_attempt(run, PLAN, committed, force=True) == 2
    Staging(run, PLAN, 2)  # and killed again
    assert choose_attempt(run, PLAN, committed, force=False) == 2


def test_a_staged_attempt_at_another_plan_is_not_gone_on_with(run: ActiveRun) -> None:
    committed = commit(run)
    other = replace(PLAN, config={"score": {"x": 2}})
    Staging(run, other, 1)
    assert choose_attempt(run, PLAN, committed, force=False) == 0
    assert choose_attempt(run, other, committed, force=False) == 1
    assert choose_attempt(run, PLAN, committed, force=True) == 2


def test_an_attempt_older_than_the_committed_one_is_never_gone_on_with(run: ActiveRun) -> None:
    Staging(run, PLAN, 0)  # killed, and then a later attempt was committed
    older = run.staging_root(0) / f"rewards-{PLAN.fingerprint(0)[:16]}"
    aside = older.rename(run.path / "aside")
    committed = commit(run, attempt=1)
    aside.rename(older)  # as a crash leaves it between the commit and the clearing of its siblings
    assert choose_attempt(run, PLAN, committed, force=False) == 1


def test_a_partial_output_is_tried_again_as_a_new_attempt(run: ActiveRun) -> None:
    staging = stage_two_shards(run)
    held = records(staging)
    committed = staging.commit(Product({"reward/a": id_of(held)}, held, {"failed": 1}))
    assert lacking(run, committed) == "1 rewards failed"
    assert choose_attempt(run, PLAN, committed, force=False) == 1
    drop = {**CONFIG, "score": {**CONFIG["score"], "on_error": "drop"}}
    dropping = ActiveRun(run.root, Config.model_validate(drop), run.imports, run.console)
    assert lacking(dropping, committed) == ""
    assert choose_attempt(dropping, PLAN, committed, force=False) == 0


# Damage


def damaged_manifest(run: Run, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = run.folder("rewards", 0) / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"]
    change(data)
    path.write_text(json.dumps({**data, "sha256": digest(data)}))  # signed: what is wrong is the content
    return path


@pytest.mark.parametrize("key", ["rows", "attempt", "stage"])
def test_a_manifest_that_was_edited_is_found(run: ActiveRun, key: str) -> None:
    commit(run)
    path = run.folder("rewards", 0) / "manifest.json"
    data = json.loads(path.read_bytes())
    path.write_text(json.dumps({**data, key: "x" if key == "stage" else 99}))
    with pytest.raises(CorruptError) as caught:
        again(run).manifest("rewards", 0)
    assert str(caught.value) == f"{path}: content changed since it was committed (sha256 differs)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"stage": ', "is not JSON: Expecting value: line 1 column 11 (char 10)"),
        (b"{\xff", "is not JSON: 'utf-8' codec can't decode byte 0xff in position 1: invalid start byte"),
        (b"[]", "content changed since it was committed (sha256 differs)"),
        (
            b'{"schema_version": %d}' % SCHEMA_VERSION,
            "content changed since it was committed (sha256 differs)",
        ),
    ],
)
def test_a_manifest_that_is_none(run: ActiveRun, content: bytes, message: str) -> None:
    commit(run)
    path = run.folder("rewards", 0) / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        again(run).manifest("rewards", 0)
    assert caught.value.exit_code == 6
    assert str(caught.value) == f"{path}: {message}"


def test_a_manifest_with_what_does_not_belong_there(run: ActiveRun) -> None:
    commit(run)
    path = damaged_manifest(run, lambda data: data.update(extra=1))
    with pytest.raises(CorruptError, match="extra: extra inputs are not permitted") as caught:
        again(run).manifest("rewards", 0)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(run: ActiveRun, name: str) -> None:
    commit(run)
    damaged_manifest(run, lambda data: data["files"][0].update(name=name))
    with pytest.raises(CorruptError, match=r"files\.0\.name: string should match pattern"):
        again(run).manifest("rewards", 0)


def test_a_manifest_of_a_newer_version(run: ActiveRun) -> None:
    commit(run)
    path = damaged_manifest(run, lambda data: data.update(schema_version=SCHEMA_VERSION + 1, unknown="to us"))
    with pytest.raises(InputError) as caught:
        again(run).manifest("rewards", 0)
    assert caught.value.exit_code == 4
    newer = f"written by a newer grpo (schema {SCHEMA_VERSION + 1}, this one reads up to {SCHEMA_VERSION})"
    assert str(caught.value) == f"{path}: {newer}"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return "content changed since it was committed (sha256 differs)"


def cut(path: Path) -> str:
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    return f"{len(content) - 1} bytes, but its manifest says {len(content)}"


def remove(path: Path) -> str:
    path.unlink()
    return "missing, though its manifest lists it"


@pytest.mark.parametrize("damage", [flip_a_bit, cut, remove])
def test_a_damaged_file_is_found_when_it_is_read(run: ActiveRun, damage: Callable[[Path], str]) -> None:
    manifest = commit(run)
    path = run.path_of(manifest.files[1], "rewards", 0)
    message = damage(path)
    with pytest.raises(CorruptError) as caught:
        again(run).read("rewards", 0)
    assert caught.value.exit_code == 6
    assert str(caught.value) == f"{path}: {message}"


def test_two_files_that_were_swapped_are_found(run: ActiveRun) -> None:
    manifest = commit(run)
    first, second = (run.path_of(record, "rewards", 0) for record in manifest.files)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(CorruptError, match=f"^{first}: "):
        again(run).read("rewards", 0)


def test_a_file_beside_the_manifest_is_no_part_of_the_output(run: ActiveRun) -> None:
    manifest = commit(run)
    (run.folder("rewards", 0) / "part-00009.parquet").write_bytes(tables.encode(rows(9)))
    assert again(run).read("rewards", 0)["group_id"].to_pylist() == [0, 1]
    assert len(manifest.files) == 2


def test_what_is_missing_names_the_command(run: Run) -> None:
    with pytest.raises(InputError) as caught:
        run.require("rewards", 3, "grpo score --iteration 3")
    folder = run.path / "iteration=000003" / "rewards"
    assert str(caught.value) == f"{folder}: missing; run `grpo score --iteration 3` first"


def test_a_policy_of_iteration_i_is_held_by_update_i_minus_1(run: Run) -> None:
    assert run.id_of("policy@0") is None
    Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0).commit(
        Product({"policy": "P", "reference": "R"}, [], {})
    )
    update = Plan("update", 1, "update", 0, {}, {})
    Staging(run, update, 0).commit(Product({"policy": "P1"}, [], {}))
    references = ("policy@0", "reference", "policy@1", "policy@2")
    assert [run.id_of(name) for name in references] == ["P", "R", "P1", None]


def test_the_weight_check_of_a_policy_is_held_with_it(run: ActiveRun) -> None:
    first = Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0)
    first.commit(
        Product({"policy": "P", "reference": "R"}, [first.write_bytes("", "weight_check.json", b"{}")], {})
    )
    with pytest.raises(InputError) as caught:
        run.weight_check_path(1)
    folder = run.path / "iteration=000000" / "update"
    assert str(caught.value) == f"{folder}: missing; run `grpo run` first"
    later = Staging(run, Plan("update", 1, "update", 0, {}, {}), 0)
    later.commit(Product({"policy": "P1"}, [later.write_bytes("policy", "weight_check.json", b"[]")], {}))
    paths = [run.path / "policy" / "weight_check.json", folder / "policy" / "weight_check.json"]
    assert [run.weight_check_path(iteration) for iteration in (0, 1)] == paths
    for iteration, path in enumerate(paths):
        path.write_bytes(b"42")
        with pytest.raises(CorruptError) as corrupt:
            again(run).weight_check_path(iteration)
        assert str(corrupt.value).startswith(f"{path}: ")


# Starting checkpoints, locks, runs


def test_a_checkpoint_id_is_of_weights_configuration_and_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / name).write_text(name)
    before = checkpoint_id(folder)
    (folder / "README.md").write_text("no part of it")
    (folder / "weight_check.json").write_text("nor this")
    assert checkpoint_id(folder) == before
    assert checkpoint_id(folder.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "config.json").write_text("other")
    assert checkpoint_id(tmp_path / "moved") != before


def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError) as caught:
        checkpoint_id(tmp_path)
    message = f"{tmp_path}: holds no .safetensors weights; pickled weights and GGUF are never read"
    assert str(caught.value) == message


HOLDER = """
import sys, time
from pathlib import Path
from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.console import Console
run = ActiveRun(Path(sys.argv[1]), Config.model_validate_json(sys.argv[2]), Path(), Console(quiet=True))
with run.lock(run.console):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_locked_out_until_the_first_ends(run: ActiveRun) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.root), run.config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LockedError) as caught, run.lock(run.console):
            pass
        holder.kill()  # the kernel lets go of the lock, whatever its text says
    assert caught.value.exit_code == 5
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    message = f"{run.path}: in use by pid {holder.pid} on {host}; wait for it, or stop it"
    assert str(caught.value) == message
    with run.lock(run.console):
        pass


def test_no_rights_to_write_is_a_resource_error_with_the_free_space(run: Run) -> None:
    folder = run.path / "file"
    folder.write_text("")
    with pytest.raises(NotADirectoryError):  # a bug of ours, not a lack of resources
        files.write_file(folder / "x", b"")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ResourceError) as caught:
            files.write_file(run.path / "x", b"")
    assert caught.value.exit_code == 7
    assert str(caught.value).startswith(f"{run.path / 'x'}: Permission denied; ")
    assert str(caught.value).endswith(" MiB free on its disk")
    assert not (run.path / "x").exists()


def test_an_unknown_run_names_those_that_are_there(run: Run) -> None:
    with pytest.raises(UsageError) as caught:
        find_run("zzz", run.root)
    assert str(caught.value) == f"{run.root / 'zzz'}: no such run; no run is there yet; `grpo run` makes one"
    for name in ("b", "a"):
        (run.root / name).mkdir()
        (run.root / name / "run.json").write_bytes(seal({"config": {}}))
    with pytest.raises(UsageError) as caught:
        find_run("zzz", run.root)
    assert str(caught.value) == f"{run.root / 'zzz'}: no such run; runs there: a, b"
    assert open_run(find_run("a", run.root)) == {"config": {}}
    (run.root / "a" / "run.json").write_bytes(seal({"config": {}}).replace(b"{}", b"[]"))
    with pytest.raises(CorruptError, match=r"run\.json: content changed since it was committed"):
        open_run(find_run("a", run.root))
    (run.root / "a" / "run.json").write_text('{"config"')
    with pytest.raises(CorruptError, match=r"run\.json: is not JSON: Expecting ':' delimiter"):
        open_run(find_run("a", run.root))


def test_within_steady_a_manifest_is_looked_at_once(run: Run) -> None:
    commit(run)
    with run.steady():
        before = run.manifest("rewards", 0)
        with run.steady():
            discard(run, run.folder("rewards", 0))
            assert run.manifest("rewards", 0) is before is not None
        assert run.manifest("rewards", 0) is before
    assert run.manifest("rewards", 0) is None


def test_what_is_discarded_never_hides_what_was_discarded_before(run: Run) -> None:
    for number in range(3):
        folder = run.folder("rewards", 0)
        files.make_folder(folder)
        (folder / str(number)).write_text("")
        discard(run, folder)
    assert tree(run.trash) == [f"iteration=000000-rewards.{n}/{n}" for n in range(3)]
    discard(run, run.folder("rewards", 0))  # not there: nothing to do


def test_staging_writes_nothing_of_time_into_ids(run: Run) -> None:
    before = time.time()
    with stage_two_shards(run).clock("killed"):
        pass
    pause = time.time()
    staging = stage_two_shards(run)  # the same attempt, gone on with
    with staging.clock("part"):
        pass
    held = records(staging)
    staging.commit(Product({"reward/a": id_of(held)}, held, {}))
    folder = run.folder("rewards", 0)
    assert list(json.loads((folder / "timings.json").read_bytes())["seconds"]) == ["part"]
    period = run.period("rewards", 0)
    started, ended = period["started"] or 0, period["ended"] or 0
    assert before <= started <= pause <= ended <= time.time()
    assert "seconds" not in (folder / "manifest.json").read_text()


@pytest.mark.parametrize("value", ['"x"', "-1", "1e12", "[1]", "NaN"])
def test_a_time_that_is_none(run: Run, value: str) -> None:
    staging = stage_two_shards(run)
    held = records(staging)
    staging.commit(Product({"reward/a": id_of(held)}, held, {}))
    path = run.folder("rewards", 0) / "timings.json"
    path.write_text(f'{{"seconds": {{}}, "started": {value}}}')
    with pytest.raises(CorruptError, match=re.escape(f"{path}: ")):
        run.period("rewards", 0)
    path.write_text('{"seconds": {}}')  # of an older version
    assert run.period("rewards", 0) == {"started": None, "ended": None}
