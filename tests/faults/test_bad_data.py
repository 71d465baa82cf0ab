"""The bad input of RELIABILITY.md that is prompts, or what an engine samples, row by row, and worse."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo
from tests.faults.refusals import RUN, STARTED, Case, check, configure, folder, loop, nothing, write

from grpo.generate import stage
from grpo.generate.engines.protocol import Engine, Group, Sample

GOOD = '{"prompt": "1+1=", "answer": "2"}\n'
SOURCE = "source: prompts.jsonl"


def second(name: str, line: str, message: str) -> Case:
    """A line behind a good one, with no line end."""
    return Case(name, write("prompts.jsonl", GOOD + line), RUN, 3, f"prompts.jsonl:2: {message}")


def column(name: str, value: str, message: str) -> Case:
    """A prompt with a column x, which is read as a whole."""
    line = f'{{"prompt": "a", "x": {value}}}\n'
    return Case(name, write("prompts.jsonl", line), RUN, 3, message)


def source(name: str, file: str, content: str | bytes | pa.Table, message: str) -> Case:
    """Another file as prompts.source; message behind its name."""

    def spoil() -> None:
        configure((SOURCE, f"source: {file}"))()
        pq.write_table(content, file) if isinstance(content, pa.Table) else write(file, content)()

    return Case(name, spoil, RUN, 3, f"{file}{message}")


TWO = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"])
PROMPTS = [
    # missing file, no rows, a bad JSON line, lone surrogate, (BOM, CRLF: below,) missing column, null or
    # empty prompt, duplicate ids: 3 with file:line
    Case("missing file", Path("prompts.jsonl").unlink, RUN, 3, "prompts.jsonl: no such file"),
    Case("no rows", write("prompts.jsonl", ""), RUN, 3, "prompts.jsonl: holds no prompt that can be used"),
    Case("blank lines", write("prompts.jsonl", "\n \n"), RUN, 3, "holds no prompt that can be used"),
    source("no rows in CSV", "p.csv", "prompt,answer\n", ": holds no prompt that can be used"),
    source("no rows in Parquet", "p.parquet", pa.table({"prompt": pa.array([], pa.string())}), ": holds no"),
    second("a bad JSON line", "{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    second("a line that is cut off", '{"prompt": "a', "not JSON: Unterminated string starting at"),
    second("a line that is no object", '["a"]', 'expected an object such as {"prompt": ...}, found list'),
    second("a lone surrogate, escaped", '{"prompt": "\\ud800"}', "holds a lone surrogate"),
    second("a lone surrogate, raw", '{"prompt": "\ud800"}', "not UTF-8; save the file as UTF-8"),
    second(
        "missing column", '{"question": "a"}', "no column prompt; found question (prompts.columns.prompt)"
    ),
    second("null prompt", '{"prompt": null}', "prompt is None; a prompt must be text that is not empty"),
    second("empty prompt", '{"prompt": ""}', "prompt is ''; a prompt must be text that is not empty"),
    second("a prompt of spaces", '{"prompt": " "}', "prompt is ' '; a prompt must be text that is not empty"),
    Case(
        "duplicate ids",
        write("prompts.jsonl", '{"id": 7, "prompt": "a"}\n{"id": 7, "prompt": "b"}\n'),
        RUN,
        3,
        "prompts.jsonl:2: id 7 occurs twice; ids must be unique",
    ),
    # a prompt longer than the model's context leaves room for: 64 positions less 4 new tokens
    second(
        "a long prompt",
        json.dumps({"prompt": "a" * 61}),
        "prompt of 61 tokens, but the context leaves room for 60 beside max_new_tokens; shorten it, or set"
        " prompts.on_long_prompt: skip",
    ),
    second("a prompt of a million bytes", json.dumps({"prompt": "a" * 10**6}), "prompt of 1000000 tokens"),
    # and worse
    second("a prompt that is a number", '{"prompt": 3}', "prompt is 3; a prompt must be text"),
    second("a duplicate key", '{"prompt": "a", "prompt": "b"}', "key prompt occurs twice"),
    second("NaN", '{"prompt": "a", "x": NaN}', "holds NaN or Infinity, which is no JSON"),
    second("1e309", '{"prompt": "a", "x": 1e309}', "holds NaN or Infinity, which is no JSON"),
    second("5,000 digits", f'{{"prompt": "a", "x": {"9" * 5000}}}', "Exceeds the limit (4300 digits)"),
    second("100,000 lists", f'{{"x": {"[" * 10**5}{"]" * 10**5}}}', "nested too deeply"),
    column("100 lists", "[" * 100 + "]" * 100, "column x holds lists or objects nested more than 32 deep"),
    column(
        "an integer of 65 bits",
        "18446744073709551616",
        "column x holds integers outside -2^63 to 2^63 - 1; make them",
    ),
    column("an empty object", "{}", "Cannot write struct type 'x' with no child field to Parquet"),
    column("two types", '1}\n{"prompt": "b", "x": "y"', "column x holds values of several types"),
    column(
        "a column of ours", '1, "group_id": 2', "column group_id is the pipeline's own; give yours another"
    ),
    Case("any bytes", write("prompts.jsonl", bytes(range(256))), RUN, 3, "prompts.jsonl:1: not JSON"),
    Case("UTF-16", write("prompts.jsonl", GOOD.encode("utf-16")), RUN, 3, "prompts.jsonl:1: not UTF-8"),
    Case("a folder", folder("prompts.jsonl"), RUN, 3, "prompts.jsonl: is a folder; a file is needed"),
    Case("a link to itself", loop("prompts.jsonl"), RUN, 3, "prompts.jsonl: no such file"),
    Case("a path too long", configure((SOURCE, f"source: {'a' * 5000}.jsonl")), RUN, 7, "File name too long"),
    source("another format", "p.txt", "a\n", ": expected a file ending in .jsonl, .csv, .parquet"),
    source("CSV: a quote never closed", "p.csv", 'prompt\n"a\n', ":2: not CSV: unexpected end of data"),
    source("CSV: a field too many", "p.csv", "prompt\na,b\n", ":2: not the 1 fields that the header names"),
    source(
        "CSV: two columns of one name", "p.csv", "prompt,prompt\na,b\n", ":1: two columns are named prompt"
    ),
    source("CSV: semicolons", "p.csv", "prompt;answer\na;b\n", ":2: no column prompt; found prompt;answer"),
    source(
        "Parquet: text", "p.parquet", "hello", ": cannot be read as Parquet: Parquet file size is 5 bytes"
    ),
    source("Parquet: two columns of one name", "p.parquet", TWO, ": two columns are named prompt"),
    source("Parquet: null", "p.parquet", pa.table({"prompt": ["a", None]}), ": row 2: prompt is None"),
]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case.input)
def test_prompts_that_cannot_be_used(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


def test_prompts_that_cannot_be_read(project: Path, grpo: Grpo) -> None:
    """Root may read every file; reading one's own memory from its start is an error for root too."""
    Path("prompts.jsonl").unlink()
    Path("prompts.jsonl").symlink_to("/proc/self/mem")
    check(grpo, Case("a file that cannot be read", nothing, RUN, 7, "prompts.jsonl: Input/output error"))


LONG_FIELD = "prompt,note\na," + "x" * 200_000 + "\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("p.jsonl", b"\xef\xbb\xbf" + GOOD.encode()),
        ("p.jsonl", GOOD.replace("\n", "\r\n")),
        ("p.csv", LONG_FIELD),
    ],
    ids=["BOM", "CRLF", "a CSV field of 200,000 characters"],
)
def test_what_just_works(project: Path, grpo: Grpo, file: str, content: str | bytes) -> None:
    source("", file, content, "").spoil()
    code, _, err = grpo("generate")
    assert code == 0, err
    rows = json.loads(grpo("sql", "select prompt_id, prompt from prompts", "--json")[1])
    assert rows == [{"prompt_id": 0, "prompt": "1+1=" if file == "p.jsonl" else "a"}]


def test_a_long_prompt_may_be_skipped_and_is_counted(project: Path, grpo: Grpo) -> None:
    configure((SOURCE, f"{SOURCE}, on_long_prompt: skip"))()
    write("prompts.jsonl", GOOD + json.dumps({"prompt": "a" * 61}))()
    code, _, err = grpo("generate")
    assert code == 0, err
    summary = json.loads(Path("artifacts/tiny/prompts/manifest.json").read_text())["summary"]
    policy = json.loads(Path("artifacts/tiny/policy/manifest.json").read_text())["ids"]["policy"]
    assert summary == {
        "policy": policy,
        "skipped": 1,
        "longest_prompt_tokens": 4,
        "source": "prompts.jsonl",
    }  # a token is a byte


# ---- what an engine samples ----


class Spoiled:
    """The real engine, but for what `change` makes of sample 1 of group 0."""

    def __init__(self, engine: Engine, change: Callable[[Sample], Sample]) -> None:
        self._engine = engine
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def sample(self, *arguments: Any) -> Iterator[Group]:
        for group in self._engine.sample(*arguments):
            first, second = group.samples
            spoiled = [first, self._change(second)] if group.group_id == 0 else group.samples
            yield replace(group, samples=spoiled)


Spoil = Callable[[Callable[[Sample], Sample]], None]


@pytest.fixture
def spoil_engine(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """spoil_engine(change): let the engine give `change(sample)` for sample 1 of group 0."""
    make = stage.make_engine

    def spoil(change: Callable[[Sample], Sample]) -> None:
        monkeypatch.setattr(stage, "make_engine", lambda *arguments: Spoiled(make(*arguments), change))

    return spoil


def test_an_empty_response_is_kept_and_its_group_is_not_trained_on(
    project: Path, grpo: Grpo, spoil_engine: Spoil
) -> None:
    spoil_engine(lambda sample: Sample(np.empty(0, np.int32), np.empty(0, np.float32), "stop"))
    code, _, err = grpo(*RUN)
    assert code == 0, err
    query = "select sample_id, response_tokens, keep, reason from samples where group_id = 0 order by 1"
    assert json.loads(grpo("sql", query, "--json")[1]) == [
        {"sample_id": 0, "response_tokens": 4, "keep": False, "reason": "group_too_small"},
        {"sample_id": 1, "response_tokens": 0, "keep": False, "reason": "empty"},
    ]


def logprob(value: float | None) -> Callable[[Sample], Sample]:
    """The last log-prob."""
    changed = np.array([value], dtype=np.float32)
    return lambda sample: replace(sample, logprobs=np.append(sample.logprobs[:-1], changed))


def token(value: int) -> Callable[[Sample], Sample]:
    """The last token."""
    return lambda sample: replace(sample, token_ids=np.append(sample.token_ids[:-1], np.int32(value)))


LOGPROB = "a log-prob is not finite or above 0"
TOKEN = "a token id outside the vocabulary of 258"
SAMPLES: dict[str, tuple[Callable[[Sample], Sample], str]] = {
    # log-probs null, NaN, infinite, > 0, or not one per token; a token id outside the vocabulary: 3
    "a log-prob that is null": (logprob(None), LOGPROB),
    "a log-prob that is NaN": (logprob(float("nan")), LOGPROB),
    "a log-prob that is inf": (logprob(float("inf")), LOGPROB),
    "a log-prob that is -inf": (logprob(float("-inf")), LOGPROB),
    "a log-prob > 0": (logprob(1e-6), LOGPROB),
    "a log-prob too few": (
        lambda sample: replace(sample, logprobs=sample.logprobs[:-1]),
        "3 log-probs for 4 tokens",
    ),
    "a log-prob too many": (
        lambda sample: replace(sample, token_ids=sample.token_ids[:-1]),
        "4 log-probs for 3 tokens",
    ),
    "a token id behind the vocabulary": (token(258), TOKEN),
    "a token id below 0": (token(-1), TOKEN),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_that_cannot_be_trusted(project: Path, grpo: Grpo, spoil_engine: Spoil, name: str) -> None:
    change, problem = SAMPLES[name]
    spoil_engine(change)
    message = f"generate: rollout (iteration, group_id, sample_id) (0, 0, 1): {problem}"
    check(grpo, Case(name, nothing, RUN, 3, message, STARTED))
