"""A fork shares what came before, and nothing of what it does shows in the other run."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.faults import crash

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


def test_a_pruned_checkpoint_cannot_be_gone_on_from(finished: Path, grpo: Grpo) -> None:
    options = ["--set", "iterations=5", "--set", "checkpoints={keep_last: 2, keep_every: null}"]
    assert grpo("run", *options)[0] == 0
    code, _, err = grpo("fork", "tiny", "other", "--iteration", "2")
    place = RUN / "iteration=000001/update"
    assert (code, err) == (
        4,
        f"error: {place}: policy 2 was pruned (checkpoints.keep_last, keep_every); there are policies"
        " 0, 4, 5, the nearest is 0\n",
    )
    assert grpo("fork", "tiny", "other", "--iteration", "4")[0] == 0
    assert grpo("run", "--set", "run=other", *options)[0] == 0
    mine, theirs = (
        {
            name.partition("/")[2]: value
            for name, value in crash.contents(Path()).items()
            if name.startswith(run)
        }
        for run in ("other/", "tiny/")
    )
    assert mine == theirs


def test_a_fork_may_begin_with_checkpoints_that_were_pruned(project: Path, grpo: Grpo) -> None:
    few = ("--set", "checkpoints={keep_last: 2, keep_every: 2}")
    assert grpo("run", "--set", "iterations=5", *few)[0] == 0
    assert grpo("fork", "tiny", "other", "--iteration", "2")[0] == 0
    assert (project / "artifacts/other/iteration=000000/update/pruned.json").exists()
    code, out, _ = grpo("verify", "other")  # of its newest two updates, one was pruned where it came from
    assert (code, "0 damaged, 0 broken, 0 stale" in out) == (0, True)
    assert grpo("run", "--set", "run=other", *few)[0] == 0


SIZED = (
    "iteration=000000/rollouts/part-*.parquet",
    "iteration=000001/rewards/part-*.parquet",
    "iteration=000000/update/policy/model.safetensors",
    "iteration=000001/update/optimizer/*.safetensors",
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


def test_two_forks_of_one_name_at_once_make_one_whole_run(finished: Path, grpo: Grpo) -> None:
    for _ in range(3):
        children = [crash.Child(finished, [["fork", "tiny", "other"]]) for _ in range(3)]
        codes = [child.wait()[0] for child in children]
        assert codes.count(0) == 1
        assert set(codes) <= {0, 2, 5}
        code, out, _ = grpo("verify", "other", "--json")
        assert (code, json.loads(out)["outputs"], json.loads(out)["stale"]) == (0, 10, [])
        shutil.rmtree(FORK)
