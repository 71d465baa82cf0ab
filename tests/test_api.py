"""The Python door: the same work, checks and errors as the commands, and results in the caller's form."""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.conftest import Grpo

import grpo as door
from grpo import api
from grpo.artifacts import files
from grpo.inspect.rows import Rows
from grpo.tables import TABLES

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")


@pytest.fixture
def project(finished: Path) -> Path:
    """A finished run of two iterations, and its configuration."""
    return finished


def contents(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every committed table."""
    return {str(p.relative_to(folder)): files.sha256_of(p) for p in sorted(folder.rglob("*.parquet"))}


def test_a_run_from_python_is_that_of_the_command(
    project: Path, write_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path / "python"))
    run = door.run("pipeline.yaml", until=1, quiet=True)
    assert [row["iteration"] for row in run.iterations] == [0]
    assert door.run("pipeline.yaml", quiet=True).path == Path("artifacts/tiny")
    assert contents(Path("artifacts/tiny")) == contents(project / "artifacts" / "tiny") != {}


@pytest.mark.parametrize("given", ["tiny", "artifacts/tiny", Path("artifacts/tiny"), "./artifacts/tiny/"])
def test_a_run_is_opened_by_folder_or_name(project: Path, given: str | Path) -> None:
    run = door.open(given)
    assert (run.name, run.path, run.config.iterations) == ("tiny", Path("artifacts/tiny"), 2)
    assert repr(run) == "grpo.Run('artifacts/tiny')"
    assert len(run.samples) == 12


def test_a_run_is_opened_from_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert len(door.open(project / "artifacts" / "tiny").table("rollouts")) == 12
    assert len(door.open("../project/artifacts/tiny").table("rollouts")) == 12


def test_a_folder_is_the_run_whatever_it_was_called(project: Path) -> None:
    shutil.copytree("artifacts/tiny", "artifacts/copy")
    shutil.rmtree("artifacts/copy/iteration=000001")
    copy = door.open("artifacts/copy")
    assert (copy.name, len(copy.samples), len(door.open("tiny").samples)) == ("copy", 6, 12)
    assert {row["run"] for row in copy.samples} == {"copy"}
    changed = door.open("copy", config="pipeline.yaml", overrides={"update.learning_rate": 0.5})
    assert (changed.path, changed.config.update.learning_rate) == (Path("artifacts/copy"), 0.5)
    assert door.open("copy", overrides={"iterations": 7}).config.iterations == 7


def test_tables_and_queries_give_the_same_rows_in_every_form(project: Path, grpo: Grpo) -> None:
    run = door.open("artifacts/tiny")
    query = "select iteration, group_id, sample_id, reward, rewards from samples order by all"
    rows = run.sql(query)
    _, out, _ = grpo("sql", "--json", query)
    assert rows.rows() == json.loads(out) == list(rows)
    assert rows.df().to_dict("records") == rows.rows()
    assert rows.pl().drop("rewards").to_dicts() == [
        {name: value for name, value in row.items() if name != "rewards"} for row in rows.rows()
    ]
    assert (
        rows.arrow().column_names
        == rows.columns
        == ["iteration", "group_id", "sample_id", "reward", "rewards"]
    )
    assert len(rows) == 12
    assert "12 rows, 5 columns" in repr(rows)


@pytest.mark.parametrize(
    ("table", "count"), [("rollouts", 6), ("samples", 6), ("rewards", 6), ("advantages", 6), ("updates", 1)]
)
def test_a_table_of_one_iteration_in_the_order_of_its_key(project: Path, table: str, count: int) -> None:
    rows = door.open("tiny").table(table, iteration=1).rows()
    assert len(rows) == count
    assert {row["iteration"] for row in rows} == {1}
    keys = [(row.get("group_id", 0), row.get("sample_id", 0)) for row in rows]
    assert keys == sorted(keys)


def test_every_table_and_view_can_be_opened(project: Path) -> None:
    run = door.open("tiny")
    for name in (*TABLES, *api._VIEWS):
        assert run.table(name).columns[0] == "run", name
    assert run.table("prompts").rows()[1]["prompt"] == "1+1="
    assert [row["iteration"] for row in run.iterations] == [0, 1]


def test_two_runs_in_one_query(project: Path) -> None:
    door.run("pipeline.yaml", until=1, overrides={"run": "other", "update.learning_rate": 0.0}, quiet=True)
    query = "select run, count(*) as n from samples where iteration < $n group by run order by run"
    found = door.open("tiny").sql(query, {"n": 1}, beside=[door.open("other")])
    assert found.rows() == [{"run": "other", "n": 6}, {"run": "tiny", "n": 6}]


def test_a_stage_from_python_is_that_of_the_command(project: Path) -> None:
    run = door.open("tiny", config="pipeline.yaml")
    before = contents(run.path)
    assert [found["done"] for found in door.stages.score(run, range(0, 2), quiet=True)] == [False, False]
    more = {"score.rewards": [{"function": "reward:code"}, {"function": "reward:length", "weight": 0.0}]}
    found = door.stages.score("pipeline.yaml", "all", force=True, overrides=more, quiet=True)
    assert [(row["iteration"], row["done"], row["rows"]) for row in found] == [(0, True, 12), (1, True, 12)]
    assert {row["name"] for row in run.table("rewards")} == {"code", "length"}
    after = contents(run.path)
    assert {path for path in before if after.get(path) != before[path]} <= {
        path for path in before if "/rewards/" in path or ".trash" in path
    }


def test_four_stages_make_an_iteration(
    project: Path, write_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path / "python"))
    for stage in (door.stages.generate, door.stages.score, door.stages.advantage, door.stages.update):
        assert [row["done"] for row in stage("pipeline.yaml", 0, quiet=True)] == [True]
    at = "iteration=000000"
    mine, theirs = (contents(path / "artifacts/tiny" / at) for path in (Path(), project))
    assert mine == theirs != {}


def test_a_configuration_may_be_a_mapping(project: Path) -> None:
    values = door.open("tiny").config.model_dump()
    assert door.run(values, quiet=True).name == "tiny"
    with pytest.raises(door.UsageError, match=r"^config: updte: unknown key; did you mean update\?$"):
        door.run(values | {"updte": {}})


ERRORS: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: door.run("pipeline.yaml", until=-1), ["run", "--until", "-1"]),
    (lambda: door.run("no.yaml"), ["run", "-c", "no.yaml"]),
    (lambda: door.run("pipeline.yaml", overrides={"update.lr": 1}), ["run", "--set", "update.lr=1"]),
    (lambda: door.run("pipeline.yaml", overrides={"seed": 1}), ["run", "--set", "seed=1"]),
    (lambda: door.stages.update("pipeline.yaml", 7), ["update", "--iteration", "7"]),
    (lambda: door.stages.score("pipeline.yaml", "x"), ["score", "--iteration", "x"]),
    (
        lambda: door.stages.score("pipeline.yaml", 0, force=True, only_failed=True),
        ["score", "--iteration", "0", "--force", "--only-failed"],
    ),
    (
        lambda: door.stages.score("pipeline.yaml", 0, overrides={"score.rewards[0].weight": 2.0}),
        ["score", "--iteration", "0", "--set", "score.rewards[0].weight=2.0"],
    ),
    (lambda: door.stages.evaluate("pipeline.yaml"), ["evaluate"]),
    (lambda: door.open("tiny").sql("select nothing"), ["sql", "select nothing"]),
    (lambda: door.open("nobody"), ["status", "nobody"]),
]


@pytest.mark.parametrize(
    ("call", "command"), ERRORS, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_errors_are_those_of_the_command(
    project: Path, grpo: Grpo, call: Callable[[], Any], command: list[str]
) -> None:
    with pytest.raises(door.GrpoError) as raised:
        call()
    code, _, err = grpo(*command)
    assert err.splitlines()[-1] == f"error: {raised.value}"
    assert code == raised.value.exit_code


def test_a_run_in_use_is_left_alone(project: Path, grpo: Grpo) -> None:
    run = door.open("tiny")
    with (
        run.active.lock(run.active.console),
        pytest.raises(door.LockedError, match=r"^artifacts/tiny: in use by pid "),
    ):
        door.stages.score(run)
    assert len(run.samples) == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: door.open("tiny").table("rollout"),
            "table rollout: no such table; there are prompts, rollouts, ",
        ),
        (
            lambda: door.stages.score("pipeline.yaml", range(0, 4, 2)),
            "iteration: range(0, 4, 2) has no iterations, or",
        ),
        (
            lambda: door.run("pipeline.yaml", overrides={"seed": Path()}),
            "overrides: seed: Object of type PosixPath",
        ),
        (
            lambda: door.run("pipeline.yaml", overrides={"seed": float("nan")}),
            "overrides: seed: Out of range",
        ),
    ],
)
def test_errors_of_its_own(project: Path, call: Callable[[], Any], message: str) -> None:
    with pytest.raises(door.UsageError) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_whole_numbers_with_a_gap_stay_whole() -> None:
    data = pa.table(
        {"n": pa.array([2**53 + 1, None]), "b": pa.array([True, None]), "x": pa.array([0.5, None])}
    )
    frame = Rows(data).df()
    assert list(map(str, frame.dtypes)) == ["Int64", "boolean", "float64"]
    assert frame["n"][0] == 2**53 + 1
    assert Rows(data).pl()["n"].to_list() == [2**53 + 1, None]
    for kind in (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()):
        assert str(Rows(pa.table({"n": pa.array([1, None], kind)})).df()["n"][0]) == "1", kind


@pytest.mark.parametrize(("method", "library"), [("df", "pandas"), ("pl", "polars")])
def test_a_missing_library_is_named(method: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(door.UsageError) as raised:
        getattr(Rows(pa.table({"a": [1]})), method)()
    assert (
        str(raised.value)
        == f".{method}(): {library} is not installed; pip install {library}, or use .arrow()"
    )


def test_within_another_thread_and_a_running_loop(project: Path) -> None:
    """A notebook's cells run in a loop; other programs work in threads, where Python takes no signals."""

    async def cell() -> int:
        return len(door.run("pipeline.yaml", overrides={"iterations": 3}, quiet=True).iterations)

    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(cell())))
    thread.start()
    thread.join()
    assert found == [3]


def test_importing_stays_light() -> None:
    code = "import sys, grpo; print({'pyarrow', 'pydantic', 'typer', 'rich', 'json'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert {"open", "run", "stages", "Run", "UsageError"} <= set(dir(door))
    with pytest.raises(AttributeError, match="module 'grpo' has no attribute 'rum'"):
        door.rum  # noqa: B018


def test_a_script_needs_no_guard(project: Path) -> None:
    """Workers that import the caller's script would run all of it again."""
    call = "grpo.run('pipeline.yaml', overrides={'iterations': 3}, quiet=True)"
    Path("train.py").write_text(f"import grpo\nprint({call})\nprint(__file__)\n")
    done = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"grpo.Run('artifacts/tiny')\n{project / 'train.py'}\n", "")


SNIPPET = """\
import grpo

run: grpo.Run = grpo.open("artifacts/x", overrides={"seed": 1})
rows: grpo.Rows = run.sql("select $n as one", {"n": 1}, beside=[run], timeout_s=5)
names: list[str] = rows.columns
count: int = len(run.table("rollouts", iteration=3))
learning_rate: float = run.config.update.learning_rate
done: list[dict[str, object]] = grpo.stages.score(run, range(0, 3), force=True)
again = grpo.run({"run": "x"}, until=3, quiet=True)
try:
    grpo.stages.update("pipeline.yaml", 3)
except grpo.LockedError as error:
    code: int = error.exit_code
reveal_type(run.samples.rows())
reveal_type(again)
"""


@pytest.mark.slow
def test_what_a_user_writes_is_typed(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--ignore-missing-imports"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path)
    revealed = [
        line.partition('is "')[2].rstrip('"') for line in done.stdout.splitlines() if "Revealed" in line
    ]
    assert revealed == ["list[dict[str, Any]]", "grpo.api.Run"], done.stdout
    file.write_text(SNIPPET.replace("until=3", "until='3'"))
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert 'has incompatible type "str"; expected "int | None"' in done.stdout


loose: Any = door  # as a script without types has it


def opened() -> Any:
    return loose.open("tiny")


REFUSALS: dict[str, tuple[Callable[[], object], int, str]] = {
    "time: nan": (lambda: opened().sql("select 1", timeout_s=float("nan")), 2, "timeout_s nan: expected sec"),
    "time: -1": (lambda: opened().sql("select 1", timeout_s=-1), 2, "timeout_s -1: expected seconds, more"),
    "time: 0": (lambda: opened().sql("select 1", timeout_s=0), 2, "timeout_s 0: expected seconds, more"),
    "time: inf": (lambda: opened().sql("select 1", timeout_s=float("inf")), 2, "timeout_s inf: expected"),
    "time: text": (lambda: opened().sql("select 1", timeout_s="5"), 2, "timeout_s 5: expected seconds"),
    "time: None": (lambda: opened().sql("select 1", timeout_s=None), 2, "timeout_s None: expected seconds"),
    "time: True": (lambda: opened().sql("select 1", timeout_s=True), 2, "timeout_s True: expected seconds"),
    "query: None": (lambda: opened().sql(None), 2, "query: expected text, found None"),
    "query: bytes": (lambda: opened().sql(b"select 1"), 2, "query: expected text, found b'select 1'"),
    "parameter: an object": (
        lambda: opened().sql("select $a", {"a": object()}),
        2,
        "query: parameter a: Object of type object is not JSON serializable; expected text, a number,",
    ),
    "parameter: not used": (
        lambda: opened().sql("select 1", {"z": 1}),
        2,
        "query: parameter z: the query has no $z; leave it out",
    ),
    "parameter: not given": (lambda: opened().sql("select $a"), 2, "query: "),
    "parameters: a list": (
        lambda: opened().sql("select $1", [1]),
        2,
        "parameters: expected a mapping of nam",
    ),
    "beside: text": (lambda: opened().sql("select 1", beside="x"), 2, "beside: expected a list of open runs"),
    "beside: names": (
        lambda: opened().sql("select 1", beside=["x"]),
        2,
        "beside: expected open runs, as grpo",
    ),
    "beside: a run": (
        lambda: opened().sql("select 1", beside=opened()),
        2,
        "beside: expected a list of open",
    ),
    "until: 1.5": (
        lambda: loose.run("pipeline.yaml", until=1.5),
        2,
        "--until 1.5: expected a number of iter",
    ),
    "until: text": (lambda: loose.run("pipeline.yaml", until="x"), 2, "--until x: expected a number of iter"),
    "until: True": (lambda: loose.run("pipeline.yaml", until=True), 2, "--until True: expected a number of"),
    "until: -1": (lambda: loose.run("pipeline.yaml", until=-1), 2, "--until -1: expected a number of iterat"),
    "run: a number": (
        lambda: loose.run(5),
        2,
        "config: expected the name of a pipeline.yaml, or what one holds",
    ),
    "run: a list": (
        lambda: loose.run([1]),
        2,
        "config: expected the name of a pipeline.yaml, or what one hol",
    ),
    "run: None": (
        lambda: loose.run(None),
        2,
        "config: expected the name of a pipeline.yaml, or what one holds",
    ),
    "run: overrides": (
        lambda: loose.run("pipeline.yaml", overrides=["a=1"]),
        2,
        "overrides: expected a mapping",
    ),
    "open: None": (lambda: loose.open(None), 2, "run: expected the folder or the name of a run, found None"),
    "open: a number": (lambda: loose.open(5), 2, "run: expected the folder or the name of a run, found 5"),
    "open: config": (lambda: loose.open("tiny", config=5), 2, "config: expected the name of a pipeline.yaml"),
    "open: overrides": (lambda: loose.open("tiny", overrides=5), 2, "overrides: expected a mapping of keys"),
    "stage: target": (lambda: loose.stages.score(5), 2, "config: expected the name of a pipeline.yaml"),
    "stage: iteration": (lambda: loose.stages.score("pipeline.yaml", 1.5), 2, "--iteration 1.5: expected a"),
    "stage: True": (lambda: loose.stages.score("pipeline.yaml", True), 2, "--iteration True: expected a"),
    "stage: policy": (
        lambda: loose.stages.evaluate("pipeline.yaml", "x"),
        2,
        "--policy x: expected the number",
    ),
    "stage: policy 1.5": (
        lambda: loose.stages.evaluate("pipeline.yaml", 1.5),
        2,
        "--policy 1.5: expected the",
    ),
    "table: None": (lambda: opened().table(None), 2, "table None: no such table; there are prompts,"),
    "table: iteration": (
        lambda: opened().table("rollouts", iteration="x"),
        2,
        "iteration 'x': run tiny has it",
    ),
    "table: too late": (
        lambda: opened().table("rollouts", iteration=99),
        2,
        "iteration 99: run tiny has iterations 0 to 1",
    ),
    "table: True": (lambda: opened().table("rollouts", iteration=True), 2, "iteration True: run tiny has"),
    "table: -1": (lambda: opened().table("samples", iteration=-1), 2, "iteration -1: run tiny has iteration"),
    "table: not made": (
        lambda: opened().table("eval_rollouts", iteration=0),
        4,
        "artifacts/tiny/iteration=000000/evaluation: missing; run `grpo evaluate` first",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_argument_is_refused_in_one_line(project: Path, case: str) -> None:
    call, code, message = REFUSALS[case]
    with pytest.raises(door.GrpoError) as caught:
        call()
    assert (caught.value.exit_code, len(str(caught.value).splitlines())) == (code, 1)
    assert str(caught.value).startswith(message), str(caught.value)
