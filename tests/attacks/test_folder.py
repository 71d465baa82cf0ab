"""A run is the folder that was opened: copied, renamed, received, named by a path, or a link in it."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.faults import crash

from grpo.artifacts import files, seal
from grpo.cli.entry import COMMANDS
from grpo.errors import CorruptError

RUN, COPY, FRIEND = Path("artifacts/tiny"), Path("artifacts/copy"), Path("friend/b c's")
READERS = (
    ("status",),
    ("show", "--no-pager"),
    ("report", "--out", "r.html"),
    ("verify",),
    ("gc", "--dry-run"),
    ("export", "--out", "exported"),
)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def copied(finished: Path) -> Path:
    """A copy of the run below artifacts/, and one elsewhere whose name has a space and a quote."""
    shutil.copytree(RUN, COPY)
    shutil.copytree(RUN, FRIEND)
    return finished


def damage(run: Path) -> None:
    path = next((run / "iteration=000001/rewards").glob("part-*"))
    path.write_bytes(path.read_bytes()[:100])


PLACES = (
    ("copy", COPY),
    (str(COPY), COPY),
    (str(FRIEND), FRIEND),
    (f"./artifacts/../{FRIEND}/", FRIEND),
)


@pytest.mark.parametrize(("given", "folder"), PLACES)
def test_verify_looks_at_the_folder_that_it_is_given(
    copied: Path, grpo: Grpo, given: str, folder: Path
) -> None:
    damage(folder)
    code, out, _ = grpo("verify", given)
    assert (code, f"run {folder.name}: " in out, "1 damaged" in out) == (6, True, True)
    assert grpo("verify", "tiny")[0] == 0
    assert grpo("verify", str(folder.absolute()))[0] == 6


@pytest.mark.parametrize(("given", "folder"), PLACES)
def test_gc_removes_from_the_folder_that_it_is_given(
    copied: Path, grpo: Grpo, given: str, folder: Path
) -> None:
    received = json.loads((folder / "run.json").read_text())
    del received["sha256"]
    received["config"]["checkpoints"] = {"keep_last": 2, "keep_every": None}
    (folder / "run.json").write_bytes(seal(received))
    for run in (RUN, folder):
        (run / ".trash").mkdir()
        (run / ".trash/old").write_text("x")
    before = content(RUN)
    code, out, _ = grpo("gc", given)
    assert (code, f"removed from run {folder.name}" in out) == (0, True)
    assert content(RUN) == before
    assert not (folder / ".trash/old").exists()


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
@pytest.mark.parametrize("given", ["renamed", "artifacts/renamed", str(FRIEND)])
def test_a_run_under_another_name_is_read_as_it_is(
    copied: Path, grpo: Grpo, command: tuple[str, ...], given: str
) -> None:
    COPY.rename("artifacts/renamed")
    shutil.rmtree(RUN)  # the name that is in run.json is that of no run now
    code, out, err = grpo(command[0], given, *command[1:])
    assert code == 0, err
    assert not RUN.exists()
    if command[0] in ("status", "verify"):
        assert f"run {Path(given).name}" in out


def test_sql_takes_paths_and_calls_two_runs_of_one_name_by_them(copied: Path, grpo: Grpo) -> None:
    other = FRIEND.with_name("tiny")
    FRIEND.rename(other)
    query = "select run, count(*) as n from samples group by run order by run"
    code, out, err = grpo("sql", query, "--run", "tiny", "--run", str(other), "--run", str(RUN), "--json")
    assert code == 0, err
    assert json.loads(out) == [{"run": str(RUN), "n": 12}, {"run": str(other), "n": 12}]
    code, out, err = grpo("sql", query, "--run", str(COPY), "--json")
    assert json.loads(out) == [{"run": "copy", "n": 12}]


def test_runs_of_one_name_are_compared_and_reported(copied: Path, grpo: Grpo) -> None:
    other = FRIEND.with_name("tiny")
    FRIEND.rename(other)
    code, out, err = grpo("compare", str(other), "tiny", "--json")
    assert code == 0, err
    assert [json.loads(out)[side] for side in "ab"] == [str(other), str(RUN)]
    assert grpo("report", str(other), "tiny", "--out", "r.html")[0] == 0
    assert grpo("show", "tiny", "--against", str(other), "--no-pager")[0] == 0


@pytest.mark.parametrize("other", ["tiny", str(RUN), "artifacts/../artifacts/tiny"])
def test_a_run_is_not_compared_with_itself(copied: Path, grpo: Grpo, other: str) -> None:
    code, _, err = grpo("compare", "tiny", other)
    assert (code, "itself" in err) == (2, True)


@pytest.mark.parametrize("given", ["nothing", "./nothing", "x" * 5000, "artifacts", "model", "\x1b[31m"])
def test_what_is_no_run(copied: Path, grpo: Grpo, given: str) -> None:
    code, out, err = grpo("status", given)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "no such run; runs there: copy, tiny" in err
    assert "\x1b" not in err


def test_a_folder_may_be_called_anything(copied: Path, grpo: Grpo) -> None:
    odd = FRIEND.with_name("\x1b[31m' union select '1")
    FRIEND.rename(odd)
    for command in (
        ["status", str(odd)],
        ["verify", str(odd)],
        ["sql", "select distinct run from samples", "--run", str(odd)],
    ):
        code, out, err = grpo(*command)
        assert (code, "\x1b" in out + err) == (0, False), err


def test_a_fork_goes_on_by_its_name_alone(copied: Path, grpo: Grpo) -> None:
    new = ["--set", crash.NEW_REWARD, "--set", "iterations=3"]
    assert grpo("fork", str(FRIEND), "forked", *new)[0] == 0
    before = content(RUN)
    code, _, err = grpo("run", "forked")
    assert code == 0, err
    assert Path("artifacts/forked/iteration=000002/update/manifest.json").exists()
    assert content(RUN) == before
    assert grpo("verify", "forked")[0] == 0
    code, _, err = grpo("run", "nothing")
    assert (code, "no such run" in err) == (2, True)


def test_commands_that_work_take_a_run_by_name(copied: Path, grpo: Grpo) -> None:
    before = content(RUN)
    code, _, err = grpo("score", "copy", "--iteration", "1", "--force")
    assert code == 0, err
    assert (COPY / ".trash").exists()
    assert content(RUN) == before


# ---- links ----


def victim() -> Path:
    folder = Path("victim").absolute()
    (folder / "below").mkdir(parents=True)
    for name in ("a", "below/b", "model.safetensors"):
        (folder / name).write_text("precious")
    return folder


def in_place_of(name: str) -> Path:
    """A link to the victim where a folder of the run was, whose content the victim gets."""
    path, folder = RUN / name, victim()
    if path.exists():
        shutil.copytree(path, folder, dirs_exist_ok=True)
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(folder)
    return folder


LINKED = (
    ".trash",
    ".staging",
    ".staging/foo",
    ".staging/iteration=000005",
    ".staging/iteration=000001/rewards-0",
    "iteration=000000",
    "iteration=000001/update",
    "iteration=000000/checkpoint",
    "iteration=000000/checkpoint/policy",
    "iteration=000000/update/other",
    "iteration=000007",
    "prompts",
    "policy",
    "sources",
    "other",
)


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize(
    "command",
    [
        ["gc"],
        ["run", "--set", "iterations=5"],
        ["score", "--iteration", "1", "--force"],
        ["fork", "tiny", "new"],
        ["run", "--from", "0", "--yes"],
        ["gc", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_a_link_is_refused_before_anything_goes(
    finished: Path, grpo: Grpo, name: str, command: list[str]
) -> None:
    folder = in_place_of(name)
    before, own = content(folder), content(RUN)
    few = ["--set", "checkpoints={keep_last: 2, keep_every: null}"] if command[0] != "fork" else []
    code, _, err = grpo(*command, *few)
    assert (code, len(err.splitlines())) == (6, 1), err
    assert f"{RUN / name}: is a link to another folder" in err
    assert (content(folder), content(RUN)) == (before, own)


@pytest.mark.parametrize("name", LINKED)
def test_verify_says_so_and_sets_the_link_aside(finished: Path, grpo: Grpo, name: str) -> None:
    folder = in_place_of(name)
    before = content(folder)
    code, out, _ = grpo("verify")
    assert (code, f"{RUN / name}: is a link to {folder}" in out) == (6, True)
    assert grpo("verify", "--discard")[0] == 6
    assert not os.path.lexists(RUN / name)
    assert content(folder) == before


@pytest.mark.parametrize("target", ["nothing/here", "itself"])
@pytest.mark.parametrize(
    "name", [".trash", ".staging", "iteration=000002", "iteration=000002/rollouts", "sources"]
)
def test_a_link_that_leads_nowhere_is_refused_too(finished: Path, grpo: Grpo, name: str, target: str) -> None:
    path = RUN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    path.symlink_to(path.name if target == "itself" else Path(target).absolute())
    for command in (["gc"], ["run", "--set", "iterations=3"]):
        code, _, err = grpo(*command)
        assert (code, len(err.splitlines())) == (6, 1), err
        assert f"{path}: is a link to nowhere" in err
    code, out, _ = grpo("verify", "--discard")
    assert (code, f"{path}: is a link to" in out) == (6, True)
    assert not os.path.lexists(path)


def test_links_in_a_circle_are_one_line(project: Path, grpo: Grpo) -> None:
    assert grpo("run", "--until", "1")[0] == 0
    for name in ("circle", "circle.parquet", "circle.html"):
        Path(name).symlink_to(name)
    outs = (
        ["sql", "select 1", "--out", "circle/x.parquet"],
        ["report", "--out", "circle/x.html"],
        ["export", "--out", "circle"],
        ["export", "--out", "circle/x"],
        ["status", "./circle"],
        ["init", "circle/x"],
    )
    for command in outs:
        code, _, err = grpo(*command)
        assert (code in (2, 7), len(err.splitlines())) == (True, 1), (command, err)
    assert grpo("sql", "select 1", "--out", "circle.parquet")[0] == 0  # the link goes, as any other
    Path("model/circle.json").symlink_to("circle.json")
    assert grpo("run", "--set", "run=other", "--until", "1")[0] == 0


def test_links_in_the_trash_go_and_not_what_they_lead_to(finished: Path, grpo: Grpo) -> None:
    folder, trash = victim(), RUN / ".trash"
    (trash / "x/y").mkdir(parents=True)
    for place in (trash / "link", trash / "x/link", trash / "x/y/link"):
        place.symlink_to(folder)
    (trash / "file").symlink_to(folder / "a")
    (trash / "hard").hardlink_to(folder / "a")
    before = content(folder)
    deep = trash
    for _ in range(1200):  # deeper than a recursion may go
        deep = deep / "d"
    deep.mkdir(parents=True) if os.path.lexists(deep.parent) else _make_deep(trash)
    code, _, err = grpo("gc")
    assert code == 0, err
    assert content(folder) == before
    assert list(trash.iterdir()) == []


def _make_deep(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)
    for _ in range(1200):
        Path("d").mkdir()
        os.chdir("d")
    os.chdir(here)


def test_the_run_itself_a_link(finished: Path, grpo: Grpo) -> None:
    COPY.symlink_to("tiny")
    before = content(RUN)
    (RUN / ".trash").mkdir()
    (RUN / ".trash/x").write_text("x")
    for command in (
        ["gc", "copy"],
        ["verify", "copy", "--discard"],
        ["score", "copy", "--iteration", "0", "--force"],
    ):
        code, _, err = grpo(*command)
        assert (code, "is a link to another folder" in err) == (6, True), err
    assert {**before, ".trash/x": content(RUN)[".trash/x"]} == content(RUN)


@pytest.mark.parametrize(
    "name", ["extra.txt", "tokenizer.json", "model.safetensors", "x.jinja", "y.model", "z.json"]
)
def test_a_link_out_of_a_checkpoint_is_not_copied(project: Path, grpo: Grpo, name: str) -> None:
    secret = Path("secret").absolute()
    secret.write_text("password")
    Path("model", name).unlink(missing_ok=True)
    Path("model", name).symlink_to(secret)
    code, _, err = grpo("run")
    assert (code, f"model/{name}: is a link that leads out of the checkpoint's folder" in err) == (4, True)
    assert not any(
        path.read_bytes() == b"password" for path in Path("artifacts").rglob("*") if path.is_file()
    )


def test_links_of_the_hubs_cache_are_taken(project: Path, grpo: Grpo) -> None:
    blobs, snapshot = Path("cache/blobs"), Path("cache/snapshots/1")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(Path("model").iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert grpo("run", "--set", f"model={snapshot}", "--set", "iterations=1")[0] == 0
    (snapshot / "extra.txt").symlink_to("../../blobs/../../prompts.jsonl")
    code, _, err = grpo("run", "--set", f"model={snapshot}", "--set", "run=other")
    assert (code, "leads out of" in err) == (4, True)


def test_a_lock_with_another_name_is_left_alone(finished: Path, grpo: Grpo) -> None:
    folder = victim()
    (RUN / ".lock").unlink()
    (RUN / ".lock").hardlink_to(folder / "a")
    code, _, err = grpo("run")
    assert (code, ".lock: has another name too" in err) == (6, True)
    assert (folder / "a").read_text() == "precious"


@pytest.mark.parametrize("name", ["run.json.tmp", ".from.json.tmp"])
def test_a_link_where_a_file_will_be_written_is_not_followed(finished: Path, grpo: Grpo, name: str) -> None:
    folder = victim()
    (RUN / name).symlink_to(folder / "new")
    (RUN / "run.json").unlink()
    grpo("run", "--from", "0", "--yes", "--set", "iterations=1")
    grpo("run", "--set", "iterations=4", "--set", "checkpoints={keep_last: 2, keep_every: null}")
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "name", ["run.json", "iteration=000001/rollouts/manifest.json", "iteration=000001/rollouts/timings.json"]
)
@pytest.mark.parametrize("command", ["status", "verify", "gc"])
def test_a_pipe_is_not_waited_for(finished: Path, grpo: Grpo, name: str, command: str) -> None:
    (RUN / name).unlink()
    os.mkfifo(RUN / name)
    code, out, err = grpo(command)
    if (command, Path(name).name) == ("gc", "timings.json"):  # it has no use for them
        assert code == 0
    else:
        assert (code, "is no file" in out + err) == (6, True)


# ---- outputs of readers ----

OUTS = (
    ["sql", "select 1", "--out", "{}.parquet"],
    ["report", "--out", "{}.html"],
    ["report", "--png", "--out", "{}.png"],
    ["evaluate", "--out", "{}.parquet"],
    ["export", "--out", "{}"],
    ["init", "{}"],
)


@pytest.mark.parametrize("command", OUTS, ids=lambda command: " ".join(command[:2]))
@pytest.mark.parametrize(
    "place",
    [
        "artifacts/tiny/x",
        "artifacts/tiny/iteration=000000/rollouts/x",
        "link/x",
        "elsewhere/x",
        "artifacts/.models/x",
    ],
)
def test_nothing_is_written_into_a_run(measured: Path, grpo: Grpo, command: list[str], place: str) -> None:
    Path("link").symlink_to(RUN)
    shutil.copytree(RUN, "elsewhere")
    Path("artifacts/.models").mkdir()
    before = content(Path())
    code, _, err = grpo(*(part.format(place) for part in command))
    assert (code, "lies in a run (" in err) == (2, True), err
    assert content(Path()) == before


def test_a_link_into_a_run_is_no_place_for_a_result(finished: Path, grpo: Grpo) -> None:
    Path("r.json").symlink_to(RUN / "run.json")
    code, _, err = grpo("sql", "select 1 as x", "--out", "r.json")
    assert (code, "lies in a run (" in err) == (2, True)
    assert Path("r.json").is_symlink()


def test_beside_runs_there_is_a_place(finished: Path, grpo: Grpo) -> None:
    assert grpo("sql", "select 1 as x", "--out", "x.json")[0] == 0
    assert grpo("report", "--out", "artifacts/r.html")[0] == 0


# ---- what a reward was ----


def test_the_source_of_a_reward_is_in_the_run(finished: Path, grpo: Grpo) -> None:
    text = Path("reward.py").read_bytes()
    name = f"{hashlib.sha256(text).hexdigest()}-reward.py"
    assert {path.name: path.read_bytes() for path in (RUN / "sources").iterdir()} == {name: text}
    Path("reward.py").write_bytes(text + b"\n# other\n")
    assert grpo("run", "--set", "iterations=3")[0] == 0
    assert len(list((RUN / "sources").iterdir())) == 2
    assert grpo("fork", "tiny", "other")[0] == 0
    assert (Path("artifacts/other/sources") / name).samefile(RUN / "sources" / name)
    assert grpo("export", "--out", "out")[0] == 0
    assert "def code(prompts" in Path("out/README.md").read_text()
    (RUN / "sources" / name).unlink()
    (RUN / "sources" / name).write_text("def code(): return 1")
    code, out, _ = grpo("verify")
    assert (code, f"{RUN / 'sources' / name}: content changed" in out) == (6, True)
    assert grpo("verify", "other")[0] == 0
    assert grpo("verify", "--discard")[0] == 6
    assert grpo("verify")[0] == 0


def test_a_full_disk_leaves_nothing_half_written(
    finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for command in (
        ["sql", "select 1 as x", "--out", "x.json"],
        ["report", "--out", "r.html"],
        ["fork", "tiny", "new"],
    ):
        code, _, err = grpo(*command)
        assert (code, len(err.splitlines()), "No space left on device" in err) == (7, 1, True), err
    assert not list(Path().glob("*.tmp")) + list(Path("artifacts").rglob("*.tmp"))


# ---- a file that is a link ----

FILES = (
    "iteration=000000/rollouts/manifest.json",
    "iteration=000000/rollouts/part-*.parquet",
    "iteration=000000/update/timings.json",
    "iteration=000001/rewards/part-*.parquet",
    "iteration=000001/checkpoint/policy/model.safetensors",
    "prompts/manifest.json",
    "policy/weight_check.json",
    "sources/*",
    "run.json",
)


def moved_out(name: str) -> Path:
    """A file of the run, by a pattern, that lies elsewhere now, with a link in its place."""
    path = next(iter(sorted(RUN.glob(name))))
    away = Path("away").absolute()
    shutil.move(path, away)
    path.symlink_to(away)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_fork_takes_no_link_before_anything_is_made(finished: Path, grpo: Grpo, name: str) -> None:
    path = moved_out(name)
    before = sorted(Path("artifacts").rglob("*"))
    code, out, err = grpo("fork", "tiny", "new")
    assert (code, out, len(err.splitlines())) == (6, "", 1), err
    assert f"{path}: is a link to another file" in err
    assert sorted(Path("artifacts").rglob("*")) == before
    code, out, _ = grpo("verify")
    assert (code, f"{path}: is a link to" in out) == (6, True)


def test_rewards_that_are_kept_take_no_link(finished: Path, grpo: Grpo) -> None:
    path = moved_out("iteration=000001/rewards/part-*.parquet")
    more = "score.rewards=[{function: 'reward:code'}, {function: 'reward:length', weight: 0}]"
    code, _, err = grpo("score", "--iteration", "1", "--force", "--set", more)
    assert (code, f"{path}: is a link, and a run has none" in err) == (6, True), err


def test_a_second_name_of_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CorruptError, match="is a link"):
        files.link_file(tmp_path / "link", tmp_path / "name")
    assert not os.path.lexists(tmp_path / "name")


# ---- a present folder that is gone ----


@pytest.mark.parametrize("command", [command.__name__ for each in COMMANDS.values() for command in each])
def test_a_folder_that_was_deleted_is_no_place_to_work_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    code, out, err = grpo(command)
    assert (code, out) == (4, "")
    assert err == "error: the present folder was deleted; go to one that is there\n"
    assert grpo("--help")[0] == 0
