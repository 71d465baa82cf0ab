"""Data and configurations nested deep: one line, with the place; never an error of Python's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import grpo
from grpo.config import PromptsConfig, validated
from grpo.errors import DataError, UsageError
from grpo.prompts.rows import normalised


def lists(depth: int) -> Any:
    value: Any = "a"
    for _ in range(depth):
        value = [value]
    return value


def objects(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value}
    return value


def both(depth: int) -> Any:
    value: Any = None
    for _ in range(depth // 2):
        value = [{"k": value}]
    return value


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi", **fields}]


PLACES: dict[str, Callable[[Any], Any]] = {
    "a column": lambda deep: {"prompt": "a", "x": deep},
    "the answer": lambda deep: {"prompt": "a", "answer": deep},
    "the prompt": lambda deep: {"prompt": [deep]},
    "tools": lambda deep: {"messages": message(), "tools": [deep]},
    "a message's content": lambda deep: {"messages": [{"role": "user", "content": deep}]},
    "a message's field": lambda deep: {"messages": message(tool_calls=[deep])},
}


@pytest.mark.parametrize("make", [lists, objects, both], ids=lambda make: make.__name__)
@pytest.mark.parametrize("depth", [34, 128, 500, 900, 3000, 100_000])
@pytest.mark.parametrize("place", PLACES)
def test_json_lines(tmp_path: Path, place: str, depth: int, make: Any) -> None:
    lines = json.dumps(PLACES[place]("HERE"))
    halves = {lists: ("[", "]"), objects: ('{"k":', "}"), both: ('[{"k":', "}]")}[make]
    times = depth // 2 if make is both else depth
    text = lines.replace('"HERE"', halves[0] * times + "1" + halves[1] * times)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + text + "\n")
    with pytest.raises(DataError) as caught:
        list(normalised(PromptsConfig(source="p.jsonl"), tmp_path))
    found = str(caught.value)
    assert found.startswith(f"{tmp_path / 'p.jsonl'}:2: ")
    assert found.endswith(("holds lists or objects nested more than 32 deep", ": nested too deeply"))


@pytest.mark.parametrize("make", [lists, objects, both], ids=lambda make: make.__name__)
def test_parquet(tmp_path: Path, make: Any) -> None:
    for depth, message in ((32, None), (34, "column x holds lists or objects nested more than 32 deep")):
        pq.write_table(pa.table({"prompt": ["a"], "x": [make(depth)]}), tmp_path / "p.parquet")
        rows = normalised(PromptsConfig(source="p.parquet"), tmp_path)
        if message is None:
            assert [row["x"] for _, row in rows] == [make(depth)]
            continue
        with pytest.raises(DataError) as caught:
            list(rows)
        assert str(caught.value) == f"{tmp_path / 'p.parquet'}: row 1: {message}"


CONFIGURATIONS: dict[str, Callable[[Any], Any]] = {
    "a section": lambda deep: {"generate": deep},
    "a number": lambda deep: {"seed": deep},
    "arguments": lambda deep: {"score": {"rewards": [{"function": "exact_match", "arguments": {"x": deep}}]}},
    "template variables": lambda deep: {"prompts": {"chat_template_arguments": {"tools": deep}}},
    "engine options": lambda deep: {"generate": {"engine_options": {"x": deep}}},
    "the whole": lambda deep: deep,
}


@pytest.mark.parametrize("make", [lists, objects, both], ids=lambda make: make.__name__)
@pytest.mark.parametrize("depth", [102, 500, 5000])
@pytest.mark.parametrize("place", CONFIGURATIONS)
def test_values_from_python(tmp_path: Path, place: str, depth: int, make: Any) -> None:
    with pytest.raises(UsageError, match="nested more than 100 deep"):
        validated(CONFIGURATIONS[place](make(depth)), Path("config"))


def test_a_value_that_holds_itself() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UsageError, match="nested more than 100 deep"):
        validated({"seed": endless}, Path("config"))


@pytest.mark.parametrize("depth", [200, 5000])
def test_overrides(depth: int) -> None:
    with pytest.raises(UsageError, match=r"--set a(\.a)+=1: nested more than 100 deep"):
        validated({}, Path("config"), [f"{'.'.join(['a'] * depth)}=1"])
    with pytest.raises(UsageError, match="nested too deeply"):
        grpo.run({}, overrides={"generate.engine_options": {"x": lists(depth)}})
