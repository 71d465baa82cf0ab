"""A user's SQL: bombs that DuckDB cannot stop, conditions that are more, statements that are no query."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo

from grpo import sql
from grpo.artifacts import Run
from grpo.cli import options
from grpo.config import Config
from grpo.errors import GrpoError, ResourceError, UsageError

# What DuckDB's own limits do not stop: memory of strings and lists, time within one function.
BOMBS = (
    "select length(repeat('x', 4000000000))",
    "select length(list_sort(range(200000000)))",
    "select damerau_levenshtein(repeat('ab', 20000), repeat('ba', 20000))",
    "select length(printf('%2000000000d', 1))",
    "select repeat('x', 1000000) from range(20000)",
    "select count(*) from range(100000000000) a, range(1000) b",
)
LIMIT_S = 4.0
# What is pasted between brackets must be one expression; each of these is something else.
NO_CONDITIONS = (
    "1=1) or (1=1",
    "1=1) union all select iteration, group_id, sample_id, advantage from samples where (true",
    "true); select (1",
    "true; select 1",
    "true -- all of them",
    "true /* all of them */",
    "true --",
    "reward > 0 /* ",
    "reward > 0, keep",
    "reward as good",
    "reward good",
    "*",
    "columns('r.*') > 0",
    "keep from samples",
    "keep where true",
    "keep group by keep",
    "keep order by reward",
    "keep limit 1",
    "keep qualify true",
    "keep using sample 3",
    "distinct keep",
    "keep union select true",
    "'",
    "(",
    "drop view samples",
    "\ud800",
)
CONDITIONS = (
    "true",
    " reward >= 0 ",
    "'a -- b' <> response",
    "response <> '/* */ ; ) or ('",
    "exists (select 1 from samples) and reward is not null",
    "case when keep then true else true end",
    "len([x for x in [1, 2] if x > 1]) = 1",
    "list_any_value(list_filter([1, 2], lambda x: x > 1)) = 2",
    "(reward,\n advantage) is not null",
)
NO_QUERIES = (
    "drop view samples",
    "create table t as select 1",
    "insert into samples select 1",
    "update samples set keep = true",
    "delete from samples",
    "set threads = 1",
    "reset threads",
    "pragma version",
    "call pragma_version()",
    "checkpoint",
    "vacuum",
    "begin",
    "use memory",
    "prepare x as select 1",
    "execute x",
    "attach 'x.db'",
    "copy (select 1) to 'x.csv'",
    "export database 'x'",
    "install json",
    "load json",
    ";",
    "-- nothing",
)
QUERIES = (
    "describe samples",
    "show tables",
    "summarize samples",
    "explain select 1",
    "from samples",
    "values (1)",
    "pivot samples on iteration using count(*)",
    "select 1;",
)


@pytest.fixture
def run(finished: Path) -> Run:
    return Run(Path("artifacts"), "tiny")


@pytest.mark.parametrize("query", BOMBS)
def test_a_bomb_ends_within_its_limits(run: Run, query: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with sql.UserSql() as user_sql:
        assert user_sql.rows(sql.Question("select 1 as one", [run])).table().to_pylist() == [{"one": 1}]
        began = time.monotonic()
        with pytest.raises(
            ResourceError, match=r"^query: (stopped after its limit of 4 s|needs more memory)"
        ):
            user_sql.rows(sql.Question(query, [run]), timeout_s=LIMIT_S)
        assert time.monotonic() - began < 2 * LIMIT_S
        # The next query works, in another process.
        assert user_sql.rows(sql.Question("select 1 as one", [run])).table().to_pylist() == [{"one": 1}]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB: of this process


def test_a_result_takes_no_memory_and_the_screen_no_more_than_it_shows(run: Run) -> None:
    with sql.UserSql() as user_sql:
        shown = user_sql.rows(sql.Question("select * from range(600000000)", [run], rows=201), timeout_s=20)
        assert 201 <= sum(map(len, shown.batches)) < 10_000
        every = user_sql.rows(sql.Question("select * from range(5000000)", [run]))
        assert max(map(len, every.batches)) <= 2048


def test_every_place_of_a_users_sql_has_the_limits(finished: Path, grpo: Grpo) -> None:
    bomb = "length(list_sort(range(200000000)))"
    Path("my.sql").write_text(
        f"select iteration, group_id, sample_id, {bomb} as advantage, {bomb} as prompt_id from rollouts"
    )
    force = ("--iteration", "1", "--force", "--set")
    for arguments, place in (
        (("sql", f"select {bomb}"), "query: "),
        (("sql", f"select {bomb}", "--out", "x.parquet"), "query: "),
        (("show", "--where", f"{bomb} > 0"), f"--where {bomb} > 0: "),
        (("advantage", *force, f"advantage.where={bomb} > 0"), "advantage.where: query: "),
        (("advantage", *force, "advantage.sql=my.sql"), "advantage.sql: my.sql: query: "),
        (("generate", *force, "generate.prompts_sql=my.sql"), "generate.prompts_sql: my.sql: query: "),
    ):
        code, out, err = grpo(*arguments)
        assert (code, out) == (7, ""), arguments
        assert f"error: {place}needs more memory than its limit of 1.75 GiB; " in err, arguments
    assert not Path("x.parquet").exists()


ENDLESS = "(select count(*) from range(10000000000) a, range(1000) b)"


def test_every_place_of_a_users_sql_can_be_given_its_time(finished: Path, grpo: Grpo) -> None:
    columns = f"iteration, group_id, sample_id, {ENDLESS} as advantage, {ENDLESS} as prompt_id"
    Path("my.sql").write_text(f"select {columns} from rollouts")
    force = ("--iteration", "1", "--force", "--set", "sql_timeout_s=1.5", "--set")
    option, key = "give --timeout-s more", "or raise sql_timeout_s"
    for arguments, way in (
        (("sql", f"select {ENDLESS}", "--timeout-s", "1.5"), option),
        (("show", "--where", f"{ENDLESS} > 0", "--timeout-s", "1.5"), option),
        (("advantage", *force, f"advantage.where={ENDLESS} > 0"), key),
        (("advantage", *force, "advantage.sql=my.sql"), key),
        (("generate", *force, "generate.prompts_sql=my.sql"), key),
    ):
        code, out, err = grpo(*arguments)
        assert (code, out) == (7, ""), (arguments, err)
        assert "stopped after its limit of 1.5 s; " in err, arguments
        assert err.endswith(f"{way}\n"), arguments


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e300"])
@pytest.mark.parametrize("command", [("sql", "select 1"), ("show", "--where", "true")], ids=" ".join)
def test_a_time_that_is_none(finished: Path, grpo: Grpo, command: tuple[str, ...], given: str) -> None:
    code, out, err = grpo(*command, "--timeout-s", given)
    assert (code, out) == (2, "")
    assert "--timeout-s" in err
    assert "expected seconds, more than 0 and finite" in err


def test_a_time_of_no_query_is_refused(finished: Path, grpo: Grpo) -> None:
    for arguments, message in (
        ((), "--timeout-s: is of the query that --where makes; give both"),
        (("--prompt", "0"), "--timeout-s: changes nothing of what --prompt without --iteration shows"),
    ):
        code, out, err = grpo("show", *arguments, "--timeout-s", "5")
        assert (code, out, message in err) == (2, "", True), err


def test_the_time_is_the_same_everywhere() -> None:
    assert options.TIMEOUT_S == sql.TIMEOUT_S == Config.model_fields["sql_timeout_s"].default


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_the_command(finished: Path, number: signal.Signals, tmp_path: Path) -> None:
    query = "select count(*) from range(1000000000000) as each(n) where hash(n) = 1"
    program = (
        "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from grpo.cli import main; main()"
    )
    (tmp_path / "spill").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "spill")}
    with subprocess.Popen([sys.executable, "-c", program, "sql", query], env=environment) as process:
        while not (children := _children(process.pid)):
            time.sleep(0.05)
        while max(map(_processor_s, children)) < 2.5:  # its imports are done, and the query is at work
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
    deadline = time.monotonic() + 30
    while any(map(_is_alive, children)) or list((tmp_path / "spill").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _processor_s(pid: int) -> float:
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def ask(user_sql: sql.UserSql, run: Run, text: str, condition: bool) -> list[dict[str, object]]:
    condition_of = ("count(*) as n", "samples") if condition else None
    found: list[dict[str, object]] = (
        user_sql.rows(sql.Question(text, [run], condition_of=condition_of), "place: my.sql")
        .table()
        .to_pylist()
    )
    return found


def test_a_condition_is_one_expression(run: Run) -> None:
    with sql.UserSql() as user_sql:
        for text in NO_CONDITIONS:
            with pytest.raises(UsageError, match=r"^place: my\.sql: query: ") as caught:
                ask(user_sql, run, text, True)
            # Nothing of the query around it, and one line.
            assert "count(" not in str(caught.value), text
            assert "LINE" not in str(caught.value), text
            assert "\n" not in str(caught.value), text
        for text in CONDITIONS:
            assert ask(user_sql, run, text, True) == [{"n": 12}], text  # 2 iterations, 3 prompts, 2 samples


def test_what_is_no_query_is_refused(run: Run) -> None:
    with sql.UserSql() as user_sql:
        for text in NO_QUERIES:
            with pytest.raises(UsageError, match=r"^place: my\.sql: query: "):
                ask(user_sql, run, text, False)
        for text in QUERIES:
            assert ask(user_sql, run, text, False), text


def test_where_that_is_more_commits_nothing(finished: Path, grpo: Grpo) -> None:
    for where in NO_CONDITIONS[:4]:
        code, _, err = grpo("advantage", "--iteration", "1", "--force", "--set", f"advantage.where={where}")
        assert code == 2, where
        assert err.splitlines()[-1].startswith("error: advantage.where: query: "), where
        code, _, err = grpo("show", "--where", where)
        assert code == 2, where
        assert err.startswith(f"error: --where {where}: "), where
    assert grpo("verify")[0] == 0
    [path] = Path("artifacts/tiny/iteration=000001/advantages").glob("*.parquet")
    assert pq.read_table(path).num_rows == 6


def test_random_numbers_are_those_of_the_seed(finished: Path, grpo: Grpo) -> None:
    def kept() -> list[bool]:
        where = ("--set", "advantage.where=random() < 0.5")
        code, _, err = grpo("advantage", "--iteration", "1", "--force", *where)
        assert code == 0, err
        found = json.loads(
            grpo("sql", "select keep from advantages where iteration = 1 order by all", "--json")[1]
        )
        return [row["keep"] for row in found]

    assert kept() == kept()


def test_an_error_of_the_process_is_no_hang(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with sql.UserSql() as user_sql:
        ask(user_sql, run, "select 1", False)
        os.kill(user_sql._pid or 0, signal.SIGSEGV)
        with pytest.raises(
            GrpoError, match=r"^place: my\.sql: query: its process was ended by signal 11; ask for"
        ):
            ask(user_sql, run, "select 1", False)
