from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo.config import PromptsConfig
from grpo.errors import DataError
from grpo.prompts.arithmetic import held_out_rows
from grpo.prompts.source import Row, read_rows


def read(folder: Path, name: str, content: bytes) -> list[tuple[str, Row]]:
    (folder / name).write_bytes(content)
    return list(read_rows(PromptsConfig(source=name), folder))


def refused(folder: Path, name: str, content: bytes) -> str:
    """The message of the DataError, with the folder cut off."""
    with pytest.raises(DataError) as caught:
        read(folder, name, content)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


# ---- JSON lines ----


def test_jsonl_rows_come_with_file_and_line(tmp_path: Path) -> None:
    rows = read(tmp_path, "p.jsonl", b'{"prompt": "a", "level": [1, null]}\n\n  \n{"prompt": "b"}')
    assert rows == [
        (f"{tmp_path}/p.jsonl:1", {"prompt": "a", "level": [1, None]}),
        (f"{tmp_path}/p.jsonl:4", {"prompt": "b"}),  # lines 2 and 3 are blank
    ]


def test_jsonl_with_a_byte_order_mark_and_crlf_just_works(tmp_path: Path) -> None:
    plain = '{"prompt": "é\u2028ü"}\n{"prompt": "b"}\n'  # U+2028 ends no line
    marked = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()
    rows = read(tmp_path, "p.jsonl", marked)
    assert [row for _, row in rows] == [{"prompt": "é\u2028ü"}, {"prompt": "b"}]
    assert rows == read(tmp_path, "p.jsonl", plain.encode())


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    [(_, row)] = read(tmp_path, "p.jsonl", rb'{"prompt": "\ud83d\ude42"}')
    assert row == {"prompt": "🙂"}


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"prompt: b", "not JSON: Expecting value at column 1"),
        (b'{"prompt": "b"', "not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "b"} {}', "not JSON: Extra data at column 17"),
        (b'{"prompt": "b\tc"}', "not JSON: Invalid control character at at column 14"),
        (rb'{"prompt": "\ud83d"}', "holds a lone surrogate (\\ud800-\\udfff), which is not text"),
        (rb'{"prompt": "b", "\udc00": 1}', "holds a lone surrogate (\\ud800-\\udfff), which is not text"),
        (b'{"prompt": "b", "score": NaN}', "holds NaN or Infinity, which is no JSON"),
        (b'{"prompt": "b", "score": [-Infinity]}', "holds NaN or Infinity, which is no JSON"),
        (b'["b"]', 'expected an object such as {"prompt": ...}, found list'),
        (b"null", 'expected an object such as {"prompt": ...}, found NoneType'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\xff"}', "not UTF-8; save the file as UTF-8"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8; save the file as UTF-8"),  # Latin-1
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    # The bad line is the fifth of seven: a file is read in blocks, and the block is not the line.
    text = refused(tmp_path, "p.jsonl", GOOD * 4 + line + b"\n" + GOOD * 2)
    assert text == f"p.jsonl:5: {message}"


def test_rows_before_a_bad_line_were_already_given(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(GOOD + b"{")
    rows = read_rows(PromptsConfig(source="p.jsonl"), tmp_path)
    assert next(rows)[1] == {"prompt": "a"}  # a file larger than memory is read line by line
    with pytest.raises(DataError):
        next(rows)


def test_utf16_is_not_utf8(tmp_path: Path) -> None:
    text = refused(tmp_path, "p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"))
    assert text == "p.jsonl:1: not UTF-8; save the file as UTF-8"


# ---- CSV ----


def test_csv_rows_are_text_and_may_span_lines(tmp_path: Path) -> None:
    content = b'prompt,answer,level\n"a, ""b""\nc",1,\n\nd,2,x\n'
    assert read(tmp_path, "p.csv", content) == [
        (f"{tmp_path}/p.csv:3", {"prompt": 'a, "b"\nc', "answer": "1", "level": None}),
        (f"{tmp_path}/p.csv:5", {"prompt": "d", "answer": "2", "level": "x"}),
    ]


def test_csv_with_a_byte_order_mark_and_crlf_just_works(tmp_path: Path) -> None:
    rows = read(tmp_path, "p.csv", b'\xef\xbb\xbfprompt,answer\r\n"a\r\nb",1\r\nc,2\r\n')
    # Line ends end a row; within quotes they are part of the text.
    assert [row for _, row in rows] == [
        {"prompt": "a\r\nb", "answer": "1"},
        {"prompt": "c", "answer": "2"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,answer\na,1\nb\n", "p.csv:3: not the 2 fields that the header names"),
        (b"prompt,answer\na,1\nb,2,3\n", "p.csv:3: not the 2 fields that the header names"),
        (b'prompt\na\n"b\nc\nd\n', "p.csv:3: not CSV: unexpected end of data"),  # the quote of line 3
        (b'prompt\n"a"b\n', "p.csv:2: not CSV: ',' expected after '\"'"),
        (b"prompt,n,n\na,1,2\n", "p.csv:1: two columns are named n; every column needs its own name"),
        (b"prompt\na\nb\ncaf\xe9\n", "p.csv:4: not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    assert refused(tmp_path, "p.csv", content) == message


def test_csv_of_nothing_or_a_header_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path, "p.csv", b"") == []
    assert read(tmp_path, "p.csv", b"prompt,answer\n") == []


# ---- Parquet ----


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "a", "answer": 1, "tags": ["x"], "info": {"n": 1.5}},
        {"prompt": "b", "answer": None, "tags": [], "info": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=1)
    assert list(read_rows(PromptsConfig(source="p.parquet"), tmp_path)) == [
        (f"{tmp_path}/p.parquet: row 1", rows[0]),
        (f"{tmp_path}/p.parquet: row 2", rows[1]),
    ]


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, "p.parquet", b'{"prompt": "a"}\n')
    assert text.startswith("p.parquet: cannot be read as Parquet: ")
    pq.write_table(pa.table({"prompt": ["a" * 1000]}), tmp_path / "q.parquet")
    text = refused(tmp_path, "q.parquet", (tmp_path / "q.parquet").read_bytes()[:-9])
    assert text.startswith("q.parquet: cannot be read as Parquet: ")


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    broken: Any = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet: cannot be read as Parquet: .*0xff in position 0"):
        list(read_rows(PromptsConfig(source="p.parquet"), tmp_path))


# ---- which source ----


def test_the_built_in_task_has_its_eighty_training_sums(tmp_path: Path) -> None:
    rows = list(read_rows(PromptsConfig(source="arithmetic"), tmp_path))
    assert [place for place, _ in rows] == [f"arithmetic:{n}" for n in range(1, 81)]
    assert rows[0] == ("arithmetic:1", {"prompt": "0+0=", "answer": "0"})
    held_out = {row["prompt"] for row in held_out_rows()}
    assert not held_out & {row["prompt"] for _, row in rows}


def test_the_sums_that_the_built_in_task_leaves_out_are_a_source_too(tmp_path: Path) -> None:
    rows = list(read_rows(PromptsConfig(source="arithmetic_held_out"), tmp_path))
    assert rows[0] == ("arithmetic_held_out:1", {"prompt": "0+1=", "answer": "1"})
    assert [row for _, row in rows] == held_out_rows()


def test_an_absolute_path_stands_for_itself(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(GOOD)
    assert len(list(read_rows(PromptsConfig(source=str(tmp_path / "p.jsonl")), tmp_path / "elsewhere"))) == 1


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "p.csv").mkdir()  # a folder is no file
    with pytest.raises(DataError) as caught:
        list(read_rows(PromptsConfig(source=name), tmp_path))
    found = "is a folder; a file is needed" if name == "p.csv" else "no such file"
    assert str(caught.value) == f"prompts.source: {tmp_path}/{name}: {found}"


@pytest.mark.parametrize("name", ["p.json", "p.txt", "p", "p.arrow", "p.JSONL.gz"])
def test_another_format_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    text = refused(tmp_path, name, GOOD)
    known = ".jsonl, .csv, .parquet"
    assert text == f"prompts.source: {name}: expected a file ending in {known}"
