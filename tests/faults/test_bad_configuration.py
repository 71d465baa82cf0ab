"""The bad input of RELIABILITY.md that is pipeline.yaml or the command line, row by row, and worse."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from tests.conftest import PIPELINE, Grpo
from tests.faults.refusals import RUN, RUN_ON, STARTED, Case, check, configure, folder, loop, nothing, write

LEVELS = "abcdefghi"
BEHIND = PIPELINE.count("\n") + 1  # the line behind it
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in pairwise(LEVELS)
)


def text(name: str, content: str | bytes, message: str) -> Case:
    """A whole pipeline.yaml; message behind the file's name."""
    return Case(name, write("pipeline.yaml", content), RUN, 2, f"pipeline.yaml{message}")


def key(override: str, message: str) -> Case:
    """A value by --set; the message names its key."""
    path = override.partition("=")[0]
    return Case(override, nothing, [*RUN, "--set", override], 2, f"--set {path}: {message}")


YAML = [
    # malformed YAML, tabs, not UTF-8, duplicate keys: 2 with line and column; the rest is in tests/config
    text("YAML: a list that is not closed", "run: [a\nmodel: m\n", ":2:6: expected ',' or ']', but got ':'"),
    text("YAML: a quote that is not closed", "run: 'r\n", ":2:1: found unexpected end of stream"),
    text(
        "YAML: a tab behind a break of Unicode",
        "run: r # \u2028\n\tmodel: m\n",
        ":2:1: found character '\\t' that cannot start any token; use",
    ),
    text("YAML: UTF-16", PIPELINE.encode("utf-16"), ":1:1: not UTF-8; save the file as UTF-8"),
    text("YAML: any bytes", bytes(range(256)), ":2:118: not UTF-8"),
    # and worse
    text("YAML: a number", "3\n", ": expected a section with keys, found 3"),
    text("YAML: two documents", f"{PIPELINE}---\n{PIPELINE}", f":{BEHIND}:1: but found another document"),
    text("YAML: aliases that expand to 9^9", BOMB, ":1:11: aliases that expand to more than 100,000 values"),
    text("YAML: an alias of itself", "run: &x [*x]\n", ":1:6: nested too deeply"),
    Case(  # with line and column where the parser counts how deep it is
        "YAML: 5,000 lists in one another",
        write("pipeline.yaml", f"run: {'[' * 5000}{']' * 5000}\n"),
        RUN,
        2,
        ": nested too deeply",
    ),
    text(
        "YAML: a value of a million characters",
        f"run: {'x' * 10**6}\n{PIPELINE[10:]}",
        ": run: expected at most 64 letters",
    ),
    text("YAML: a number of 5,000 digits", f"seed: {'9' * 5000}\n", ":1:7: cannot be read as int: 99999"),
    text(
        "YAML: another version",
        "%YAML 1.3\n---\nrun: r\n",
        ": a %YAML directive of a version that is not known",
    ),
    text("YAML: a set", "run: !!set {a}\n", ":1:6: unknown tag tag:yaml.org,2002:set"),
    text("YAML: null as a key", f"{PIPELINE}null: 1\n", f":{BEHIND}:1: a key must be text; put it in quotes"),
    text("YAML: an escaped lone surrogate", 'run: "\\ud800"\n', ": run: expected valid Unicode text, found"),
    Case("pipeline.yaml: a folder", folder("pipeline.yaml"), RUN, 2, "pipeline.yaml: is a folder; a file is"),
    Case("pipeline.yaml: a link to itself", loop("pipeline.yaml"), RUN, 2, "cannot be read: Too many levels"),
    Case(
        "pipeline.yaml: missing",
        Path("pipeline.yaml").unlink,
        RUN,
        2,
        "no such file; `grpo init` makes a project",
    ),
]


@pytest.mark.parametrize("case", YAML, ids=lambda case: case.input[:60])
def test_a_file_that_is_no_configuration(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


TWICE = "score.rewards=[{function: 'reward:code'}, {function: 'reward:code'}]"
KEYS = [
    # unknown key, wrong type, out of range: one of each, for the command line; all are in tests/config
    key("modle=x", "unknown key; did you mean model?"),
    key("update.learning_rate=1e309", "expected a finite number, found Infinity"),
    key("iterations=0", "expected at least 1, found 0"),
    # contradictory fields (`top_p < 1`, longer than the model's context)
    Case(
        "top_p < 1",
        nothing,
        [*RUN, "--set", "generate.top_p=0.9"],
        2,
        "generate: top_p cuts the distribution",
    ),
    Case(
        "longer than the model's context",
        nothing,
        [*RUN, "--set", "generate.max_new_tokens=64"],
        2,
        "generate.max_new_tokens: 64 leaves no room for a prompt in the model's context of 64 tokens",
    ),
    Case(
        "two rewards of one name", nothing, [*RUN, "--set", TWICE], 2, "two rewards are named code; give one"
    ),
]


@pytest.mark.parametrize("case", KEYS, ids=lambda case: case.input[:60])
def test_a_value_that_cannot_be_meant(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def judge(keys: str, message: str, commits: Sequence[str] = ()) -> Case:
    """A judge with these keys beside a url, a model and a rubric."""
    shared = {"url": "'http://127.0.0.1:1/v1'", "model": "m", "rubric": "'Rate {response}'"}
    shared.pop(keys.partition(":")[0], None)
    given = ", ".join([*(f"{name}: {value}" for name, value in shared.items()), keys])
    setting = f"score.rewards=[{{judge: {{{given}}}}}]"
    return Case(f"judge: {keys}", nothing, [*RUN, "--set", setting], 2, message, commits)


JUDGES = [
    judge(
        "url: 127.0.0.1:8000", "--set score.rewards[0].judge.url: expected http(s)://host[:port]/path without"
    ),
    judge(
        "url: 'https://key@host/v1'", "judge.url: expected http(s)://host[:port]/path without a user, a query"
    ),
    judge(
        "url: 'https://host/v1?key=1'",
        "judge.url: expected http(s)://host[:port]/path without a user, a query",
    ),
    judge("pattern: '[0-9]'", "judge.pattern: needs exactly one group, the score, but has 0"),
    judge("pattern: '(a)(b)'", "judge.pattern: needs exactly one group, the score, but has 2"),
    judge("pattern: '('", "judge.pattern: is not a regular expression: missing ), unterminated subpattern"),
    judge("scale: [10, 1]", "judge.scale: expected [lowest, highest], the lowest first"),
    judge("scale: [1]", "judge.scale: expected at least 2 items, found 1"),
    judge("grades: {A: 1.0}, scale: [0, 1]", "judge: grades say what an answer counts, and so does scale"),
    judge("extra_body: {model: x}", "judge.extra_body: model has a key of its own, model"),
    judge(
        "extra_body: {stream: true}", "judge.extra_body: stream and n cannot be set: one whole answer is read"
    ),
    judge("concurrency: 0", "judge.concurrency: expected at least 1, found 0"),
    judge("requests_per_minute: 0", "judge.requests_per_minute: expected more than 0, found 0"),
    judge("retries: 101", "judge.retries: expected at most 100, found 101"),
    judge("api_key: sk-1", "judge.api_key: unknown key; did you mean api_key_env?"),
    judge("rubric: ''", "judge.rubric: is empty; give the question, or a file that holds it"),
    # and what only the run can see
    judge("rubric: none.md", "none.md: no such file"),
    judge(
        "rubric: 'Rate it'",
        "score.rewards: judge: rubric: has no {response}, so every rollout would get the s",
    ),
    judge(
        "rubric: '{response} {anwser}'", "rubric: {anwser} is not a column; did you mean {answer}?", STARTED
    ),
    judge("api_key_env: NO_SUCH_KEY", "api_key_env: NO_SUCH_KEY is not set in the environment"),
]


@pytest.mark.parametrize("case", JUDGES, ids=lambda case: case.input[:60])
def test_a_judge_that_cannot_be_asked(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def words(command: list[str], message: str, code: int = 2) -> Case:
    """A mistake of the command line itself."""
    return Case(" ".join(command), nothing, command, code, message)


HINT = "expected key=value, such as --set update.learning_rate=1e-6"
COMMANDS = [
    # `--set foo` without `=`; unknown stage, run or iteration
    words(["run", "--set", "foo"], f"--set foo: {HINT}"),
    words(["run", "--set", "seed="], f"--set seed=: {HINT}"),
    words(["run", "--set", ""], f"--set : {HINT}"),
    words(["eval"], "No such command 'eval'. Did you mean 'evaluate'; see `grpo --help`"),
    words(["generat"], "No such command 'generat'. Did you mean 'generate'; see `grpo --help`"),
    words(["status", "nope"], "artifacts/nope: no such run; runs there: tiny"),
    words(["show", "nope"], "artifacts/nope: no such run; runs there: tiny"),
    words(["sql", "select 1", "--run", "nope"], "artifacts/nope: no such run; runs there: tiny"),
    words(["fork", "nope", "new"], "artifacts/nope: no such run; runs there: tiny"),
    words(["score", "--iteration", "3"], "--iteration 3: run tiny has iterations 0 to 1"),
    words(["show", "--iteration", "9"], "--iteration 9: run tiny has rollouts of 0 to 1"),
    words(["fork", "tiny", "new", "--iteration", "9"], "--iteration 9: run tiny has completed 2 iterations"),
    words(["run", "--from", "99"], "--from 99: run tiny has no iteration 99; it has iterations 0 to 1"),
    # and worse
    words(
        ["score", "--iteration", "x"],
        "--iteration x: expected a number such as 3, a range such as 0-19, or all",
    ),
    words(["score", "--iteration", "5-2"], "--iteration 5-2: ends before it begins; did you mean 2-5?"),
    words(["score", "--iteration", "-1"], "--iteration -1: expected a number such as 3"),
    words(["score", "--iteration", "1-"], "--iteration 1-: expected a number such as 3"),
    words(["score", "--iteration", "9" * 5000], "expected a number such as 3, a range such as 0-19, or all"),
    words(["score", "--iteration", "\u0663"], "--iteration \u0663: expected a number such as 3"),
    words(["run", "--from", "-1"], "--from -1: run tiny has no iteration -1; it has iterations 0 to 1"),
    words(["run", "--from", "x"], "Invalid value for '--from': Input should be a valid integer"),
    words(["run", "--until", "-1"], "--until -1: expected a number of iterations, 0 or more"),
    words(["run", "--until", "1.5"], "Invalid value for '--until': Input should be a valid integer"),
    words(["status", ".."], "artifacts/..: no such run; runs there: tiny"),
    words(["status", "a\0b\x1b[31m"], r"a\x00b\x1b[31m: no such run; runs there: tiny"),
    words(["status", "x" * 5000], "no such run; runs there: tiny"),
    words(["fork", "tiny", ".."], "--set run: expected at most 64 letters"),
    words(["fork", "tiny", "tiny"], "artifacts/tiny: is there already; give the fork another name"),
    words(
        ["fork", "tiny", "new", "--set", "model=x"],
        "model: a fork shares it with tiny; a new `run:` can have",
    ),
    words(["run", "-c", "model"], "model: is a folder; a file is needed"),
    words(
        ["run", "--set", "a.b.c=1"], "pipeline.yaml with --set: a: unknown key; known keys: run, iterations"
    ),
    words(["run", "--set", "score.rewards[x]=1"], "item x of a list of 1; the first is 0"),
    words(
        ["run", "--set", "seed=[[["], "--set seed=[[[: expected the node content, but found '<stream end>'"
    ),
    words(["run", "--set", f"seed={'[' * 3000}{']' * 3000}"], "nested too deeply"),
    words(["run", "--set", "seed=\0"], r"--set seed=\x00: control character U+0000 in the text"),
    words(["sql", "selec 1"], "query: Parser Error: syntax error at or near"),
    words(["sql", ";"], "query: gives no rows; write a select"),
    words(["sql", "select '\ud800'"], "query: character 8 is a lone surrogate, no text; leave it out"),
    words(
        ["sql", "select 1", "--timeout-s", "inf"], "--timeout-s inf: expected seconds, more than 0 and finite"
    ),
    words(
        ["sql", "select 1", "--timeout-s", "nan"], "--timeout-s nan: expected seconds, more than 0 and finite"
    ),
    words(
        ["sql", "select 1", "--timeout-s", "-1"], "--timeout-s -1: expected seconds, more than 0 and finite"
    ),
    words(["sql", "select 1", "--out", "."], "--out .: expected a file ending in .parquet, .csv or .json"),
    words(["show", "--where", "1;2"], "--where 1;2: syntax error at or near"),
    words(
        ["show", "--groups", "0"], "Invalid value for '--groups': Input should be greater than or equal to 1"
    ),
]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: ascii(case.input)[1:60])
def test_a_mistake_on_the_command_line(finished: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def query(key: str, value: str) -> tuple[str, str]:
    """What makes `advantage` take a query or condition of the user's."""
    return ("update:", f"advantage: {{{key}: {value}}}\nupdate:")


SQL = [
    Case(
        "advantage.where: an unknown column",
        configure(query("where", "nope > 1")),
        RUN_ON,
        2,
        "advantage.where: query: Binder Error: Referenced column",
    ),
    Case(
        "advantage.where: a second statement",
        configure(query("where", "'1=1); drop table x; --'")),
        RUN_ON,
        2,
        "advantage.where: query: syntax error at or near",
    ),
    Case("advantage.sql: missing", configure(query("sql", "my.sql")), RUN_ON, 2, "my.sql: no such file"),
]


@pytest.mark.parametrize("case", SQL, ids=lambda case: case.input)
def test_sql_of_the_user_s_that_cannot_be_used(finished: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def test_sql_of_the_user_s_that_is_not_utf8(finished: Path, grpo: Grpo) -> None:
    configure(query("sql", "my.sql"))()
    message = "my.sql:1:1: not UTF-8; save the file as UTF-8"
    check(grpo, Case("advantage.sql: bytes", write("my.sql", b"\xff"), RUN_ON, 2, message))
