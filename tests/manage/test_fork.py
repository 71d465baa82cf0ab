"""A fork shares what came before, and nothing of what it does shows in the other run."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo, Once, copy_to_work_in, run_within
from tests.faults import crash

from grpo.artifacts import ActiveRun
from grpo.errors import ResourceError

RUN, FORK = crash.RUN, Path("artifacts/other")


def states(grpo: Grpo, name: str, *options: str) -> list[list[str]]:
    rows = json.loads(grpo("status", name, "--json", *options)[1])["iterations"]
    return [[stage["state"] for stage in row["stages"].values()] for row in rows]


def test_a_fork_is_made_of_links_and_goes_on_in_its_own_way(finished: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    code, out, err = grpo("fork", "tiny", "other", "--iteration", "1", "--set", crash.NEW_REWARD)
    assert (code, out) == (0, "")
    shared = "1 iterations, and of iteration 1 generate"
    assert err == f"other begins as tiny: {shared}; next: grpo run other\n"
    for path in FORK.rglob("*.parquet"):
        assert path.samefile(RUN / path.relative_to(FORK))
    assert not (FORK / "iteration=000001/rewards").exists()
    options = ["--set", "run=other", "--set", crash.NEW_REWARD]
    assert states(grpo, "other", *options) == [
        ["done", "changed", "done", "done"],
        ["done", *["missing"] * 3],
    ]
    assert grpo("run", "other", "--set", "iterations=3")[0] == 0  # by the pipeline.yaml that lies in it
    assert {
        name: value for name, value in crash.contents(Path()).items() if name.startswith("tiny/")
    } == before
    assert grpo("verify", "other")[0] == grpo("verify", "tiny")[0] == 0
    query = "select run, count(*) as n from samples where iteration = 1 group by run order by run"
    rows = json.loads(grpo("sql", query, "--run", "tiny", "--run", "other", "--json")[1])
    assert rows == [{"run": "other", "n": 6}, {"run": "tiny", "n": 6}]


def test_without_a_change_the_whole_run_is_taken_over(finished: Path, grpo: Grpo) -> None:
    code, out, _ = grpo("fork", "tiny", "other", "--json")
    assert (code, json.loads(out)) == (0, {"run": "other", "from": "tiny", "iterations": 2, "taken": []})
    code, _, err = grpo("run", "--set", "run=other")
    assert (code, err) == (0, "run other: 2 iterations are complete; nothing to do\n")
    assert json.loads((FORK / "run.json").read_text())["config"]["run"] == "other"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiny", "tiny"], 2, f"{RUN}: is there already; give the fork another name"),
        (["tiny", "../x"], 2, "run: "),
        (["none", "other"], 2, "artifacts/none: no such run; runs there: tiny"),
        (["tiny", "other", "--iteration", "3"], 2, "--iteration 3: run tiny has completed 2 iterations"),
        (["tiny", "other", "--iteration", "-1"], 2, "--iteration -1: run tiny has completed 2 iterations"),
        (["tiny", "other", "--set", "seed=7"], 2, "seed: a fork shares it with tiny; a new `run:` can"),
        (["tiny", "other", "--set", "model=else"], 2, "model: a fork shares it with tiny; a new `run:` can"),
    ],
)
def test_what_cannot_be_forked(
    finished: Path, grpo: Grpo, arguments: list[str], code: int, message: str
) -> None:
    found, out, err = grpo("fork", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert not FORK.exists()


FEW = ("--set", "checkpoints={every: 3, keep_last: 2, keep_every: null}")


def of(run: str) -> dict[str, str]:
    """Content of a run, without its checkpoints: when they are written is not what was computed."""
    found = {name.partition("/")[::2]: value for name, value in crash.contents(Path()).items()}
    return {name: value for (own, name), value in found.items() if own == run and "/checkpoint/" not in name}


@pytest.mark.parametrize("iteration", range(6))
def test_a_fork_goes_on_from_any_policy(forked_from: Path, grpo: Grpo, iteration: int) -> None:
    """It links the nearest one on disk, and rebuilds what comes after."""
    code, _, err = grpo("fork", "tiny", "other", "--iteration", str(iteration), *FEW)
    assert code == 0, err
    nearest = max(policy for policy in (0, 3, 5) if policy <= iteration)
    linked = [path.parent for path in FORK.glob("iteration=*/checkpoint/manifest.json")]
    # Of the iteration it goes on with, the update is what `other` would make too, and its policy with it.
    wanted = {nearest - 1, *([iteration] if iteration + 1 in (3, 5) else [])} - {-1}
    assert {int(path.parent.name.partition("=")[2]) for path in linked} == wanted
    for path in FORK.rglob("*.safetensors"):
        assert path.samefile(RUN / path.relative_to(FORK))
    code, _, err = grpo("run", "other", "--set", "iterations=5", *FEW)
    assert code == 0, err
    assert grpo("verify", "other")[0] == 0
    assert of("other") == of("tiny")


@pytest.fixture(scope="session")
def forked_once(write_project: Callable[[Path], Path], once: Once) -> Path:
    """A project of five iterations with the policies 0, 3 and 5 on disk; read it only."""
    return once(
        "forked", lambda folder: run_within(write_project(folder), "run", "--set", "iterations=5", *FEW)
    )


@pytest.fixture
def forked_from(forked_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the test runs in it."""
    return copy_to_work_in(forked_once, tmp_path, monkeypatch)


SIZED = (
    "iteration=000000/rollouts/part-*.parquet",
    "iteration=000001/rewards/part-*.parquet",
    "iteration=000001/checkpoint/policy/model.safetensors",
    "iteration=000001/checkpoint/optimizer/*.safetensors",
    "prompts/*.parquet",
    "policy/weight_check.json",
    "iteration=000000/rollouts/manifest.json",
)
UNSIZED = ("iteration=000000/update/timings.json", "sources/*")  # whose size is recorded nowhere


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [*product(SIZED, ["folder", "cut", "longer"]), *product(UNSIZED, ["folder"])],
)
def test_a_fork_takes_no_damaged_file_and_leaves_nothing(
    finished: Path, grpo: Grpo, pattern: str, damage: str
) -> None:
    path = next(iter(sorted(RUN.glob(pattern))))
    if damage == "folder":
        path.unlink()
        path.mkdir()
        (path / "within").write_text("x")
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-9] if damage == "cut" else content + b"}")
    there = sorted(Path("artifacts").iterdir())
    code, out, err = grpo("fork", "tiny", "other")
    assert (code, out, len(err.splitlines()), f"error: {path}: " in err) == (6, "", 1, True), err
    assert sorted(Path("artifacts").iterdir()) == there


@pytest.mark.parametrize("error", [FileNotFoundError, ResourceError])
def test_a_fork_whose_folder_gets_its_name_as_it_is_taken_is_told_that_the_name_is_there(
    finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The other fork's folder is gone between the kernel's lock and the lease."""
    lock = ActiveRun.lock

    def late(run: ActiveRun, console: Any) -> Any:
        if run.name != ".fork-other":
            return lock(run, console)
        FORK.mkdir()
        raise error("artifacts/.fork-other/.lease.json: No such file or directory")

    monkeypatch.setattr(ActiveRun, "lock", late)
    code, _, err = grpo("fork", "tiny", "other")
    assert (code, "is there already; give the fork another name" in err) == (2, True)


def test_two_forks_of_one_name_at_once_make_one_whole_run(finished: Path, grpo: Grpo) -> None:
    for _ in range(3):
        children = [crash.Child(finished, [["fork", "tiny", "other"]]) for _ in range(3)]
        codes = [child.wait()[0] for child in children]
        assert codes.count(0) == 1
        assert set(codes) <= {0, 2, 5}
        code, out, _ = grpo("verify", "other", "--json")
        assert (code, json.loads(out)["outputs"], json.loads(out)["stale"]) == (0, 11, [])
        shutil.rmtree(FORK)
