"""Sweeps, patterns of runs, three runs beside each other, and measures that are not one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo, Once, copy_to_work_in, run_within

from grpo.inspect.compare.page import _apart

TWO = "score.rewards=[{function: 'reward:code'}, {function: 'reward:length', weight: 0.5}]"


def succeed(grpo: Grpo, *arguments: str) -> str:
    code, out, err = grpo(*arguments)
    assert code == 0, err
    return out


def document(grpo: Grpo, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed(grpo, *arguments, "--json"))
    return found


@pytest.fixture(scope="module")
def swept(write_measured_project: Callable[[Path], Path], once: Once) -> Path:
    """A project after a sweep of two learning rates and two seeds."""
    sweep = ("--sweep", "update.learning_rate=0.01,0.02", "--sweep", "seed=0,1", "--set", "iterations=1")
    return once("swept", lambda folder: run_within(write_measured_project(folder), "run", *sweep))


@pytest.fixture
def in_swept(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copy_to_work_in(swept, tmp_path, monkeypatch)


NAMES = [f"tiny-learning_rate-{rate}-seed-{seed}" for rate in ("0.01", "0.02") for seed in (0, 1)]


def test_a_sweep_makes_a_run_for_each_combination(in_swept: Path, grpo: Grpo) -> None:
    assert sorted(path.name for path in Path("artifacts").glob("tiny*")) == NAMES
    for name, rate, seed in zip(NAMES, (0.01, 0.01, 0.02, 0.02), (0, 1, 0, 1), strict=True):
        config = json.loads((Path("artifacts") / name / "run.json").read_text())["config"]
        assert (config["run"], config["update"]["learning_rate"], config["seed"]) == (name, rate, seed)
    # The same command finds all of it done; with a third value it makes the two that are new.
    again = ("--sweep", "update.learning_rate=0.01,0.02,0.03", "--sweep", "seed=0,1", "--set", "iterations=1")
    runs = document(grpo, "run", *again)["runs"]
    assert [run["worked"] for run in runs] == [0, 0, 0, 0, 1, 1]


def test_one_run_that_fails_does_not_keep_the_others_from_theirs(measured_project: Path, grpo: Grpo) -> None:
    Path("reward.py").write_text(
        "def code(completions, bad=0, **_):\n    return [1 / (1 - bad)] * len(completions)\n"
    )
    sweep = ("--sweep", "score.rewards[0].arguments.bad=1,0", "--set", "iterations=1")
    code, _, err = grpo("run", *sweep)
    assert code == 8
    assert "error: 1 of 2 runs of the sweep failed; the first, tiny-bad-1: " in err
    assert document(grpo, "status", "tiny-bad-0")["iterations"][0]["stages"]["update"]["state"] == "done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--sweep", "seed"),
            "--sweep seed: expected key=v1,v2, such as --sweep update.learning_rate=1e-6,3e-6",
        ),
        (("--sweep", "seed="), "--sweep seed=: expected key=v1,v2"),
        (("--sweep", "seed=[1"), "--sweep seed=[1: "),
        (("--sweep", "run=a,b"), "--sweep run: the names are made of the values"),
        (("--sweep", "seed=1,1"), "--sweep: two of its runs would be named tiny-seed-1"),
        (("--sweep", "seed=1,x"), '--set seed: expected a whole number, found "x"'),
        (("--sweep", "sede=1,2"), "sede: unknown key"),
        (("--sweep", "seed=1", "--from", "0"), "--sweep makes runs of its own"),
        (("--sweep", f"prompts.source={'x' * 70}"), "run: expected at most 64 letters"),
    ],
)
def test_a_sweep_that_cannot_be_makes_nothing(
    measured_project: Path, grpo: Grpo, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = grpo("run", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("artifacts").exists()


def test_dry_run_lists_a_sweep(measured_project: Path, grpo: Grpo) -> None:
    found = document(grpo, "run", "--sweep", "update.schedule=constant,linear", "--dry-run")["runs"]
    assert [run["run"] for run in found] == ["tiny-schedule-constant", "tiny-schedule-linear"]
    assert found[0]["set"] == ['update.schedule="constant"', "run=tiny-schedule-constant"]
    assert not Path("artifacts").exists()


def test_dry_run_says_what_a_null_stands_for(measured_project: Path, grpo: Grpo) -> None:
    found = document(grpo, "run", "--dry-run", "--set", TWO)["evaluate"]
    assert (found["pass_reward"], found["temperature"], found["max_new_tokens"]) == ("code", 1.0, 4)
    found = document(grpo, "run", "--dry-run", "--set", TWO, "--set", "evaluate.pass_reward=length")[
        "evaluate"
    ]
    assert found["pass_reward"] == "length"


def test_a_pattern_names_runs_in_every_command_that_reads(in_swept: Path, grpo: Grpo) -> None:
    rows = json.loads(
        succeed(grpo, "sql", "select distinct run from iterations order by run", "--run", "*0.02*", "--json")
    )
    assert [row["run"] for row in rows] == NAMES[2:]
    assert [run["run"] for run in document(grpo, "status", "tiny-*-seed-1")["runs"]] == [NAMES[1], NAMES[3]]
    assert succeed(grpo, "status", "tiny-*").count("policies, measured") == 4
    succeed(grpo, "report", "tiny-*", "--png", "--out", "all.png")
    assert document(grpo, "compare", "tiny-*")["runs"] == NAMES
    assert document(grpo, "compare", "artifacts/*0.01*")["a"] == NAMES[0]  # two: as ever
    for command in (("show",), ("verify",), ("gc",), ("export", "--out", "out")):
        one = succeed(grpo, *command[:1], "*0.02-seed-1", *command[1:], "--json")
        assert NAMES[3] in one or command == ("show",)
        code, _, err = grpo(*command[:1], "*0.02*", *command[1:])
        assert (code, f"*0.02*: means {NAMES[2]}, {NAMES[3]}; this command takes one run" in err) == (2, True)
    for reader in ("status", "report", "show", "compare"):
        code, _, err = grpo(reader, "nothing-*")
        assert (code, "nothing-*: no such run; runs there: tiny-learning_rate" in err) == (2, True)


def test_runs_beside_each_other(in_swept: Path, grpo: Grpo) -> None:
    found = document(grpo, "compare", *NAMES[:3])
    assert found["configuration"] == {"seed": [0, 1, 0], "update.learning_rate": [0.01, 0.01, 0.02]}
    numbers = {row["name"]: row["values"] for row in found["numbers"]}
    query = "select run, reward, tokens, entropy from iterations where iteration = 0 order by run"
    rows = json.loads(succeed(grpo, "sql", query, "--run", "*", "--json"))[:3]
    assert numbers["reward"] == [row["reward"] for row in rows]
    assert numbers["tokens_spent"] == [row["tokens"] for row in rows]
    assert numbers["entropy"] == pytest.approx([row["entropy"] for row in rows])
    query = "select pass_at[1] as p from evals where iteration = 1 order by run"
    last = [row["p"] for row in json.loads(succeed(grpo, "sql", query, "--run", "*", "--json"))][:3]
    assert numbers["eval_pass_at_1"] == last
    assert found["measured_otherwise"] == {}
    text = succeed(grpo, "compare", *NAMES[:3])
    assert "0.01-seed-0   0.01-seed-1   0.02-seed-0" in text
    assert "best pass@1 of code (policy)" in text
    code, _, err = grpo("compare", *NAMES[:2], "code")
    assert (code, "more than two things are runs, and some are none; runs there: tiny-" in err) == (2, True)
    code, _, err = grpo("compare", NAMES[0])
    assert (code, "one thing alone; give two rewards, or two runs or more" in err) == (2, True)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["lr-1-seed-0", "lr-2-seed-0"], ["1", "2"]),
        (["a", "b"], ["a", "b"]),
        (["a", "a-2"], ["a", "a-2"]),
        (["x-1", "x-1-b"], ["1", "1-b"]),
        (["x-1-x", "x-x"], ["x-1-x", "x-x"]),
    ],
)
def test_names_are_told_apart_in_few_words(names: list[str], short: list[str]) -> None:
    found = _apart(names)
    assert len(set(found)) == len(names)
    assert all(found)
    if names[0] != "x-1-x":
        assert found == short


# Every way in which a number of one name is two measures.
OTHERWISE = {
    "another weight": (TWO, TWO.replace("0.5", "2"), {"reward", "eval_reward"}),
    "another reward": (TWO, "score.rewards=[{function: 'reward:code'}]", {"reward", "eval_reward"}),
    "other arguments": (
        "score.rewards=[{function: 'reward:code', arguments: {x: 1}}]",
        "score.rewards=[{function: 'reward:code', arguments: {x: 2}}]",
        {"reward", "rewards.code", "eval_reward", "eval_pass_at_1", "pass_rate"},
    ),
    "another function of the name": (
        "score.rewards=[{function: 'reward:code', name: x}]",
        "score.rewards=[{function: 'reward:length', name: x}]",
        {"reward", "rewards.x", "eval_reward", "eval_pass_at_1", "pass_rate"},
    ),
    "another threshold": (
        "evaluate.pass_threshold=1",
        "evaluate.pass_threshold=2",
        {"eval_pass_at_1", "pass_rate"},
    ),
    "weight 0 beside it": (TWO, TWO.replace("0.5", "0.5, timeout_s: 9"), set()),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_not_one_measure_is_said(measured_project: Path, grpo: Grpo, case: str) -> None:
    one, other, names = OTHERWISE[case]
    path = Path("reward.py")
    path.write_text(path.read_text().replace("**columns", "x=0, **columns"))
    options = ("--set", "iterations=1", "--set", "prompts.source=prompts.jsonl")
    for run, setting in (("a", one), ("b", other)):
        succeed(grpo, "run", *options, "--set", f"run={run}", "--set", setting)
    found = document(grpo, "compare", "a", "b")
    assert set(found["measured_otherwise"]) == names
    text = succeed(grpo, "compare", "a", "b")
    assert ("not one measure" in text) == bool(names)
    if case == "another weight":
        assert "(a: code + 0.5 length; b: code + 2 length)" in text
        assert "reward *" in text
    if case == "another threshold":
        assert "(a: code >= 1; b: code >= 2)" in text


@pytest.mark.parametrize("setting", ["evaluate=null", "evaluate.pass_threshold=1"])
def test_what_the_pass_rate_counts_is_named(measured_project: Path, grpo: Grpo, setting: str) -> None:
    """Without an evaluation it counts the first reward at 1, whatever `evaluate` would have counted."""
    settings = ["--set", "iterations=1", "--set", TWO]
    passes = ["--set", "evaluate.pass_reward=length", "--set", "evaluate.pass_threshold=2"]
    succeed(grpo, "run", "--set", "run=a", *settings, *passes)
    other = ["--set", setting] if setting == "evaluate=null" else [*passes, "--set", setting]
    succeed(grpo, "run", "--set", "run=b", *settings, *other)
    counted = {"a": "length >= 2", "b": "code >= 1" if setting == "evaluate=null" else "length >= 1"}
    told = f"a: {counted['a']}; b: {counted['b']}"
    succeed(grpo, "run", "--set", "run=c", "--set", "seed=1", *settings, *passes)
    for names in (["a", "b"], ["a", "b", "c"]):
        found = document(grpo, "compare", *names)
        assert found["passing"] == {name: {**counted, "c": counted["a"]}[name] for name in names}
        assert found["measured_otherwise"]["pass_rate"].startswith(told)
        assert f"({told}" in succeed(grpo, "compare", *names)
    assert "pass_rate counts length >= 2\n" in succeed(grpo, "compare", "a", "c")


def test_a_section_that_is_null_in_a_run_is_one_line(measured_project: Path, grpo: Grpo) -> None:
    for name, settings in (("a", []), ("b", ["--set", "evaluate=null"]), ("c", ["--set", "evaluate=null"])):
        succeed(grpo, "run", "--set", "iterations=1", "--set", f"run={name}", *settings)
    found = document(grpo, "compare", "a", "b")["configuration"]
    assert found == ["evaluate: {...} -> null"]
    assert document(grpo, "compare", "b", "a")["configuration"] == ["evaluate: null -> {...}"]
    found = document(grpo, "compare", "a", "b", "c")["configuration"]
    assert found == {"evaluate": ["{...}", None, None]}
    # What differs between those that have it is said too.
    succeed(grpo, "run", "--set", "iterations=1", "--set", "run=d", "--set", "evaluate.every=2")
    found = document(grpo, "compare", "a", "b", "d")["configuration"]
    assert found == {"evaluate": ["{...}", None, "{...}"], "evaluate.every": [1, None, 2]}


def test_another_file_of_a_reward_is_another_measure(measured_project: Path, grpo: Grpo) -> None:
    succeed(grpo, "run", "--set", "iterations=1", "--set", "run=a")
    path = Path("reward.py")
    path.write_text(path.read_text().replace("% 7", "% 5"))
    succeed(grpo, "run", "--set", "iterations=1", "--set", "run=b")
    assert "rewards.code" in document(grpo, "compare", "a", "b")["measured_otherwise"]


def test_values_that_an_edit_replaced_are_compared(measured_project: Path, grpo: Grpo) -> None:
    succeed(grpo, "run", "--set", TWO)
    query = "select value from rewards where name = 'code' order by iteration, group_id, sample_id"
    before = [row["value"] for row in json.loads(succeed(grpo, "sql", query, "--json"))]
    code, _, err = grpo("compare", "code", "code@previous")
    assert (code, ".trash holds no other values of code" in err) == (4, True)
    path = Path("reward.py")
    text = path.read_text()
    path.write_text(text.replace("% 7", "% 5"))
    succeed(grpo, "score", "--iteration", "all", "--force", "--set", TWO)
    after = [row["value"] for row in json.loads(succeed(grpo, "sql", query, "--json"))]
    # A further rerun in which `code` gives the same, and another weight: neither hides what it gave before.
    path.write_text(text.replace("% 7", "% 5") + "\n# read\n")
    succeed(grpo, "score", "--iteration", "all", "--force", "--set", TWO)
    succeed(grpo, "score", "--iteration", "1", "--force", "--set", TWO.replace("0.5", "0.25"))
    found = document(grpo, "compare", "code", "code@previous", "--examples", "99")
    pairs = sorted((row["a"], row["b"]) for each in found["examples"] for row in each["samples"])
    assert found["rollouts"] == {"compared": len(before), "without_both": 0}
    assert set(pairs) <= set(zip(after, before, strict=True))
    assert any(a != b for a, b in pairs)
    # Beside another reward, and of one iteration.
    assert document(grpo, "compare", "length", "code@previous", "--iteration", "1")["b"] == "code@previous"
    # Only of rollouts that are still there, and only until gc.
    succeed(grpo, "generate", "--iteration", "1", "--force", "--set", "seed=0")
    succeed(grpo, "gc", "--set", TWO)
    code, _, err = grpo("compare", "code", "code@previous")
    assert (code, "`grpo gc` removes them" in err) == (4, True)


def test_the_argument_that_is_no_run_is_named(finished: Path, grpo: Grpo) -> None:
    """Also where the configured run is not begun, which is not what was asked about."""
    shutil.copytree("artifacts/tiny", "artifacts/other")
    edit = Path("pipeline.yaml").read_text().replace("run: tiny", "run: begun_later")
    Path("pipeline.yaml").write_text(edit)
    for given in (["tiny", "nope"], ["nope", "tiny"]):
        code, _, err = grpo("compare", *given)
        assert (code, err) == (2, "error: artifacts/nope: no such run; runs there: other, tiny\n")
    code, _, err = grpo("compare", "tiny", "nope", "other")
    assert (code, "error: nope: more than two things are runs" in err) == (2, True)
    code, _, err = grpo("compare", "code", "length")
    assert (code, err) == (2, "error: artifacts/begun_later: no such run; runs there: other, tiny\n")


@pytest.mark.parametrize("command", [["status"], ["show"], ["compare", "p00"], ["sql", "select 1", "--run"]])
def test_of_many_runs_ten_are_listed_the_nearest_first(project: Path, grpo: Grpo, command: list[str]) -> None:
    for number in range(45):
        folder = Path("artifacts") / f"p{number:02}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    code, _, err = grpo(*command, "p4x")
    assert code == 2
    names = err.partition("runs there: ")[2].strip().removesuffix(" and 35 more").split(", ")
    assert err.endswith(" and 35 more\n")
    assert names[:5] == ["p40", "p41", "p42", "p43", "p44"]
    assert len(names) == 10
