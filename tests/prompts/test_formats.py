"""The same data in four formats gives the same text; what each can hold that the others cannot is said."""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from grpo.config import PromptsConfig
from grpo.errors import DataError
from grpo.prompts.arrow import arrow_table
from grpo.prompts.columns import ABSENT, find, text_of
from grpo.prompts.rows import normalised

DATA = Path(__file__).parents[1] / "data" / "prompts"
FORMATS = ("jsonl", "csv", "parquet", "folder")


def answers(folder: Path, kind: str, values: pa.Array) -> list[str | None]:
    """The answers of a file of this kind that holds `values` as they are commonly written in it."""
    if kind in ("jsonl", "csv") and values.type == pa.float32():
        values = pa.array([float(str(value)) for value in values.to_numpy()])  # as NumPy prints them
    data = pa.table({"prompt": [f"p{n}" for n in range(len(values))], "answer": values})
    path = folder / f"p.{kind}"
    if kind == "jsonl":
        rows = [row | {"answer": _in_json(row["answer"])} for row in data.to_pylist()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        plain = [_in_csv(value) for value in values.to_pylist()]
        lines = [f"p{n},{text}\n" for n, text in enumerate(plain)]
        path.write_text("prompt,answer\n" + "".join(lines))
    elif kind == "parquet":
        pq.write_table(data, path)
    else:
        datasets.Dataset(data).save_to_disk(str(path))
    return [row["answer"] for _, row in normalised(PromptsConfig(source=f"p.{kind}"), folder)]


def _in_json(value: Any) -> Any:
    """JSON has no dates, and no decimals but floats."""
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, datetime.date) else value


def _in_csv(value: Any) -> str:
    return "" if value is None or value != value else str(value)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([3, 7, None]), ["3", "7", None]),
        (pa.array([3.0, 7.0, None]), ["3", "7", None]),  # whole numbers with a gap, as pandas has them
        (pa.array([3.0, float("nan"), -2.0]), ["3", None, "-2"]),
        (pa.array([0.5, 2.25, None]), ["0.5", "2.25", None]),
        (pa.array([0.1, 2.5], pa.float32()), ["0.1", "2.5"]),
        (pa.array([-5, 100], pa.int8()), ["-5", "100"]),
        (pa.array([2**63 - 1, -(2**63)]), [str(2**63 - 1), str(-(2**63))]),
        (pa.array([2**63, 2**64 - 1], pa.uint64()), [str(2**63), str(2**64 - 1)]),
        (pa.array([True, False, None]), ["True", "False", None]),
        (pa.array(["a", "3.0", "x"]), ["a", "3.0", "x"]),
        (pa.array(["a", None], pa.large_string()), ["a", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([datetime.date(2026, 1, 2), None]), ["2026-01-02", None]),
        (pa.array([None, None, "z"]), [None, None, "z"]),
    ],
    ids=str,
)
def test_the_same_data_gives_the_same_text(
    tmp_path: Path, kind: str, values: pa.Array, texts: list[str | None]
) -> None:
    assert answers(tmp_path, kind, values) == texts


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_is_missing_in_every_column(tmp_path: Path, kind: str) -> None:
    data = pa.table({"prompt": ["a", "b"], "level": ["x", None]})
    path = tmp_path / f"p.{kind}"
    write: dict[str, Callable[[], object]] = {
        "jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in data.to_pylist())),
        "csv": lambda: pc.write_csv(data, path),
        "parquet": lambda: pq.write_table(data, path),
        "folder": lambda: datasets.Dataset(data).save_to_disk(str(path)),
    }
    write[kind]()
    rows = [row for _, row in normalised(PromptsConfig(source=path.name), tmp_path)]
    assert [row["level"] for row in rows] == ["x", None]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5"),
        (3.0, "3"),
        (-0.0, "0"),
        (1e300, "1e+300"),
        (2.0**53, "9007199254740992.0"),
        (decimal.Decimal("3.00"), "3"),
        (decimal.Decimal("2.50"), "2.5"),
        (decimal.Decimal("1E+2"), "100"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02 03:04:00"),
        (float("nan"), None),
        (True, "True"),
    ],
)
def test_a_value_has_one_text(value: Any, text: str | None) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize(
    ("value", "found"), [([1], "list"), ({"a": 1}, "dict"), (b"x", "bytes"), (float("inf"), "inf")]
)
def test_what_is_no_answer(value: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"must be text or a number, found {found}"):
        text_of(value)


def test_a_csv_column_of_whole_numbers_and_others_stays_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,answer\na,3.0\nb,2.5\nc,v1.0\n")
    assert [row["answer"] for _, row in normalised(PromptsConfig(source="p.csv"), tmp_path)] == [
        "3.0",
        "2.5",
        "v1.0",
    ]


# ---- integers of 64 bits, and values of several types ----


@pytest.mark.parametrize("values", [[2**63, 1], [2**64 - 1, None], [0, 2**63]])
def test_64_bits_without_a_sign_are_kept(values: list[int | None]) -> None:
    rows = [{"prompt_id": n, "prompt": "a", "messages": None, "x": value} for n, value in enumerate(values)]
    found = arrow_table(rows, ["p:1", "p:2"])
    assert found["x"].to_pylist() == values
    assert found.schema.field("x").type == pa.uint64()


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([1, 2**64], "p:2"),
        ([-1, 2**63], "p:2"),
        ([1, "a", 2], "p:2"),
        ([[1], [2], ["x"]], "p:3"),
        ([{"n": 1}, {"n": "a"}], "p:2"),
        ([None, 1, None, True], "p:4"),
    ],
)
def test_the_first_value_that_does_not_fit_is_named(values: list[Any], place: str) -> None:
    rows = [{"prompt_id": n, "prompt": "a", "messages": None, "x": value} for n, value in enumerate(values)]
    with pytest.raises(ValueError, match=f"column x holds .*first at {place}") as caught:
        arrow_table(rows, [f"p:{n + 1}" for n in range(len(rows))])
    assert "\n" not in str(caught.value)


# ---- fields of structs ----


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", 1),
        ("s.t", 2),
        ("s.u.v", 3),
        ("l[1]", 5),
        ("l[9]", None),
        ("m[0].n", 6),
        ("x.y", 7),
        ("s.d.e", 8),
        ("nil.deeper", None),
        ("none", ABSENT),
        ("s.none", ABSENT),
        ("a.t", ABSENT),
        ("s[0]", ABSENT),
        ("", {}),
    ],
)
def test_a_path_into_a_row(path: str, found: Any) -> None:
    row = {
        "a": 1,
        "s": {"t": 2, "u": {"v": 3}, "d.e": 8},
        "l": [4, 5],
        "m": [{"n": 6}],
        "x.y": 7,
        "x": {"y": 0},
        "nil": None,
    }
    assert find(row, path) == (row if path == "" else found)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (  # verl
            [
                {
                    "data_source": "s",
                    "prompt": [{"role": "user", "content": "1+2="}],
                    "ability": "math",
                    "reward_model": {"ground_truth": "3", "style": "rule"},
                    "extra_info": {"index": 0, "split": "train"},
                }
            ],
            {"answer": "reward_model.ground_truth"},
        ),
        (  # open-r1
            [
                {
                    "problem": "1+2=",
                    "solution": "It is 3.",
                    "answer": "3",
                    "source": "s",
                    "messages": [
                        {"role": "user", "content": "1+2="},
                        {"role": "assistant", "content": "It is 3."},
                    ],
                }
            ],
            {"prompt": "problem", "messages": None},
        ),
        (  # a list within a struct
            [{"question": {"text": "1+2="}, "extra_info": {"answers": ["3", "three"]}}],
            {"prompt": "question.text", "answer": "extra_info.answers[0]"},
        ),
        ([{"prompt": "1+2=", "answer.text": "3"}], {"answer": "answer.text"}),
    ],
    ids=["verl", "open-r1", "nested", "dot"],
)
def test_layouts_of_others(tmp_path: Path, kind: str, rows: list[Any], columns: Any) -> None:
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    config = PromptsConfig.model_validate({"source": path.name, "columns": columns})
    [(_, row)] = normalised(config, tmp_path)
    assert row["answer"] == "3"
    assert row["prompt"] == "1+2=" or row["messages"] == [{"role": "user", "content": "1+2="}]


def test_a_file_of_verl() -> None:
    config = PromptsConfig.model_validate(
        {"source": "verl.parquet", "columns": {"answer": "reward_model.ground_truth"}}
    )
    rows = [row for _, row in normalised(config, DATA)]
    assert [row["answer"] for row in rows] == ["3", "7", "10", "9"]
    assert rows[0]["extra_info"] == {"index": 0, "split": "train", "answer": "1 and 2\n#### 3"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"answer": "reward_model.truth"},
            "no column reward_model.truth; found data_source, prompt, ability,",
        ),
        ({"prompt": "extra_info.text"}, "no column extra_info.text; found data_source, prompt, ability,"),
    ],
)
def test_a_field_that_is_not_there_is_refused_with_those_that_are(columns: Any, message: str) -> None:
    config = PromptsConfig.model_validate({"source": "verl.parquet", "columns": columns})
    with pytest.raises(DataError) as caught:
        list(normalised(config, DATA))
    assert message in str(caught.value)
    assert "reward_model.ground_truth, reward_model.style" in str(caught.value)


def test_a_prompt_that_is_named_beside_messages_needs_a_choice(tmp_path: Path) -> None:
    rows = [{"problem": "1+2=", "messages": [{"role": "user", "content": "other"}]}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]))
    named = PromptsConfig.model_validate({"source": "p.jsonl", "columns": {"prompt": "problem"}})
    with pytest.raises(DataError) as caught:
        list(normalised(named, tmp_path))
    assert str(caught.value).endswith(
        "p.jsonl:1: has a prompt in problem and messages in messages; say which one is meant: set"
        " prompts.columns.messages: null, or leave prompts.columns.prompt out"
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_fields_of_messages_are_kept_in_every_format(tmp_path: Path, kind: str) -> None:
    calls = [{"type": "function", "function": {"name": "calc", "arguments": {"x": 1}}}]
    first: list[dict[str, Any]] = [
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "name": "calc", "tool_call_id": "a1"},
    ]
    rows: list[dict[str, Any]] = [
        {"messages": first},
        {"messages": [{"role": "user", "content": "hi", "weight": 0}]},
    ]
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    found = [row["messages"] for _, row in normalised(PromptsConfig(source=path.name), tmp_path)]
    called = {"role": "assistant", "tool_calls": calls}  # a field that is null is none
    assert found == [[first[0], called, first[2]], rows[1]["messages"]]
