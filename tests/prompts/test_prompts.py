import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from grpo.artifacts import ActiveRun, Manifest, Staging
from grpo.config import Config, PromptsConfig
from grpo.console import Console
from grpo.errors import DataError, InputError, UsageError
from grpo.models import starter_model
from grpo.prompts import table as prompts
from grpo.prompts.chat import Chat
from grpo.prompts.rendering import encode
from grpo.prompts.source import Row
from grpo.prompts.table import draw, prepare

FIXED = {"prompt_id": 0, "prompt": None, "messages": None, "answer": None}


def opened(folder: Path, **config: Any) -> ActiveRun:
    """A run whose prompts are `config`; its data is beside it."""
    whole = {
        "run": "r",
        "model": "m",
        "prompts": {"source": "p.jsonl", **config},
        "score": {"rewards": [{"function": "exact_answer"}]},
    }
    return ActiveRun(folder / "artifacts", Config.model_validate(whole), folder, Console(quiet=True))


def characters(rows: list[Row]) -> list[int]:
    return [len(row["prompt"] or "chat") for row in rows]


def prepared(run: ActiveRun, room: int | None = None) -> Manifest:
    return prepare(run, Staging(run, prompts.plan(run), 0), characters, room)


def table(folder: Path, *rows: Any, **config: Any) -> pa.Table:
    """The prompts table of JSON lines."""
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = opened(folder, **config)
    prepared(run)
    return run.read("prompts", None)


def refused(folder: Path, make: Callable[[], Any]) -> str:
    """The message of the DataError, with the folder cut off; nothing may be committed."""
    with pytest.raises(DataError) as caught:
        make()
    assert caught.value.exit_code == 3
    assert not (folder / "artifacts" / "r" / "prompts").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


# ---- the table ----


def test_prompts_are_numbered_and_their_own_columns_follow(tmp_path: Path) -> None:
    rows = [
        {"level": 2, "prompt": "a", "answer": "1", "id": "x", "tags": ["t", "u"], "info": {"by": "me"}},
        {"prompt": " b\n", "id": "y", "score": 0.5, "tags": []},
    ]
    data = table(tmp_path, *rows)
    assert data.column_names == [*FIXED, "level", "id", "tags", "info", "score"]
    common = {"messages": None}
    assert data.to_pylist() == [
        common
        | {"prompt_id": 0, "prompt": "a", "answer": "1", "level": 2, "id": "x"}
        | {"tags": ["t", "u"], "info": {"by": "me"}, "score": None},
        common
        | {"prompt_id": 1, "prompt": " b\n", "answer": None, "level": None, "id": "y"}
        | {"tags": [], "info": None, "score": 0.5},
    ]
    assert [str(field.type) for field in data.schema][4:6] == ["int64", "string"]


def test_csv_and_parquet_give_the_table_of_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1", "level": "x"}, {"prompt": "b", "answer": "2", "level": "y"}]
    expected = table(tmp_path, *rows)
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfprompt,answer,level\r\na,1,x\r\nb,2,y\r\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for kind in ("csv", "parquet"):
        (tmp_path / kind).mkdir()
        run = opened(tmp_path / kind, source=f"../p.{kind}")
        prepared(run)
        assert run.read("prompts", None).equals(expected)


def test_the_built_in_task(tmp_path: Path) -> None:
    run = opened(tmp_path, source="arithmetic")
    assert prepared(run).rows == 80
    first = FIXED | {"prompt": "0+0=", "answer": "0"}
    assert run.read("prompts", None).slice(0, 1).to_pylist() == [first]


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    names = {"prompt": "question", "answer": "solution", "messages": "chat"}
    rows = [{"question": "q", "solution": "s"}, {"chat": [{"role": "user", "content": "c"}], "solution": "t"}]
    data = table(tmp_path, *rows, columns=names)
    assert data.column_names == list(FIXED)
    assert data.to_pylist() == [
        FIXED | {"prompt": "q", "answer": "s"},
        FIXED | {"prompt_id": 1, "messages": [{"role": "user", "content": "c"}], "answer": "t"},
    ]


@pytest.mark.parametrize("taken", ["prompt", "messages", "answer", "Answer"])
def test_a_column_of_our_name_that_is_not_mapped_is_refused(tmp_path: Path, taken: str) -> None:
    # Kept as it is, the user's `answer` would stand in the place of the mapped one.
    names = {"prompt": "question", "answer": "solution", "messages": "chat"}
    row = {"question": "q", "solution": "s", taken: "other"}
    message = refused(tmp_path, lambda: table(tmp_path, row, columns=names))
    key = taken.lower()
    assert message == (
        f"p.jsonl:1: column {taken} has the name of one of the pipeline's own columns, but"
        f" prompts.columns.{key} is {names[key]}; say {key}: {taken} there, or rename yours"
    )


@pytest.mark.parametrize("key", ["answer", "messages", "prompt"])
def test_a_column_that_is_named_and_that_no_row_has_is_refused(tmp_path: Path, key: str) -> None:
    rows = [{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "answer": "1", "totl": 1}] * 2
    columns = {key: "total"}
    others = [{name: value for name, value in row.items() if name != key} for row in rows]
    message = refused(tmp_path, lambda: table(tmp_path, *others, columns=columns))
    found = ", ".join(others[0])
    assert message == f"prompts.source: p.jsonl: no column total; found {found} (prompts.columns.{key})"


def test_a_file_without_rows_is_said_as_such_whatever_columns_are_named(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda: table(tmp_path, columns={"prompt": "question"}))
    assert message == "prompts.source: p.jsonl: holds no prompt that can be used"


def test_columns_that_sql_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "Level": 1}, {"prompt": "b", "level": 2}]
    message = refused(tmp_path, lambda: table(tmp_path, *rows))
    assert message == (
        "prompts.source: p.jsonl: columns Level and level differ by case alone, which SQL does not tell"
        " apart; rename one"
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [(7, "7"), (-0.5, "-0.5"), (10**30, "1" + "0" * 30), ("7", "7"), ("", ""), (None, None)],
)
def test_an_answer_may_be_a_number(tmp_path: Path, answer: Any, text: str | None) -> None:
    assert table(tmp_path, {"prompt": "a", "answer": answer})["answer"].to_pylist() == [text]


@pytest.mark.parametrize(("answer", "found"), [(["7"], "list"), ({"n": 7}, "dict")])
def test_an_answer_of_another_kind_is_refused(tmp_path: Path, answer: Any, found: str) -> None:
    message = refused(tmp_path, lambda: table(tmp_path, {"prompt": "a", "answer": answer}))
    assert message == f"p.jsonl:1: answer must be text or a number, found {found}"


def test_an_answer_that_is_infinite_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [1.0, float("inf")]}), tmp_path / "p.parquet")
    message = refused(tmp_path, lambda: prepared(opened(tmp_path, source="p.parquet")))
    assert message == "p.parquet: row 2: answer must be text or a number, found inf"


def test_nan_in_another_column_of_parquet_stays(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "score": [float("nan")]}), tmp_path / "p.parquet")
    run = opened(tmp_path, source="p.parquet")
    prepared(run)
    [score] = run.read("prompts", None)["score"].to_pylist()
    assert score != score  # NaN, and not null


# ---- chat ----


def test_chat_and_system_make_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "?"}]
    rows = [{"prompt": "a", "answer": "1"}, {"messages": chat, "answer": "2"}]
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "Be brief."}

    plain = table(tmp_path, *rows)
    assert plain["prompt"].to_pylist() == ["a", None]
    assert plain["messages"].to_pylist() == [None, chat]

    (tmp_path / "chat").mkdir()
    as_chat = table(tmp_path / "chat", *rows, chat=True)
    assert as_chat["prompt"].to_pylist() == [None, None]
    assert as_chat["messages"].to_pylist() == [[user], chat]

    (tmp_path / "system").mkdir()
    with_system = table(tmp_path / "system", *rows, system="Be brief.")
    assert with_system["prompt"].to_pylist() == [None, None]
    assert with_system["messages"].to_pylist() == [[system, user], [system, *chat]]
    assert with_system["answer"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of {role, content} that is not empty"),
        ([], "messages must be a list of {role, content} that is not empty"),
        ({"role": "user", "content": "a"}, "messages must be a list of {role, content} that is not empty"),
        (["a"], "a message must be {role, content} with role one of system, user, assistant, tool"),
        (
            [{"role": "human", "content": "a"}],
            "a message must be {role, content} with role one of system, user, assistant, tool",
        ),
        (
            [{"content": "a"}],
            "a message must be {role, content} with role one of system, user, assistant, tool",
        ),
        ([{"role": "user"}], "a message's content must be one text, found NoneType"),
        ([{"role": "user", "content": 5}], "a message's content must be one text, found int"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "cat.png"}],
                }
            ],
            "a message's content must be one text, found a list of parts (image, text); images are not"
            " supported",
        ),
    ],
)
def test_messages_that_cannot_be_used_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    good = {"messages": [{"role": "user", "content": "a"}]}
    assert refused(tmp_path, lambda: table(tmp_path, good, {"messages": messages})) == f"p.jsonl:2: {message}"


# ---- bad input (RELIABILITY.md): 3, with file:line, nothing committed ----


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (r'{"prompt": "\ud800"}', "holds a lone surrogate (\\ud800-\\udfff), which is not text"),
        ('{"prompt": "b", "x": NaN}', "holds NaN or Infinity, which is no JSON"),
        ('{"text": "b", "x": 1}', "no column prompt; found text, x (prompts.columns.prompt)"),
        ('{"prompt": null}', "prompt is None; a prompt must be text that is not empty"),
        ('{"prompt": ""}', "prompt is ''; a prompt must be text that is not empty"),
        ('{"prompt": " \\n"}', "prompt is ' \\n'; a prompt must be text that is not empty"),
        ('{"prompt": 7}', "prompt is 7; a prompt must be text that is not empty"),
        ('{"prompt": "b", "id": "one"}', "id 'one' occurs twice; ids must be unique"),
        (
            '{"prompt": "b", "prompt_id": 1}',
            "column prompt_id is the pipeline's own; give yours another name, such as id",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a", "id": "one"}}\n{second}\n{{"prompt": "c"}}\n')
    assert refused(tmp_path, lambda: prepared(opened(tmp_path))) == f"p.jsonl:2: {message}"


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    message = refused(tmp_path, lambda: prepared(opened(tmp_path)))
    assert message == "p.jsonl:2: not UTF-8; save the file as UTF-8"


def test_an_empty_prompt_in_csv_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,answer\na,1\n,2\n")
    message = refused(tmp_path, lambda: prepared(opened(tmp_path, source="p.csv")))
    assert message == "p.csv:3: prompt is None; a prompt must be text that is not empty"


@pytest.mark.parametrize(("name", "content"), [("p.jsonl", "\n\n"), ("p.csv", "prompt,answer\n")])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    message = refused(tmp_path, lambda: prepared(opened(tmp_path, source=name)))
    assert message == f"prompts.source: {name}: holds no prompt that can be used"


def test_a_missing_file_is_named_before_anything_is_made(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda: prepared(opened(tmp_path)))
    assert message == "prompts.source: p.jsonl: no such file"
    assert list(tmp_path.iterdir()) == []


def test_ids_are_compared_with_ids_alone(tmp_path: Path) -> None:
    # A row without an id stands for none; 1 and "1" are two ids; a list is one as well.
    ids = [{}, {"id": 0}, {"id": 1}]
    assert len(table(tmp_path, *({"prompt": "a"} | row for row in ids))) == 3
    message = refused(
        tmp_path / "again", lambda: table(_made(tmp_path / "again"), *[{"prompt": "a", "id": [1]}] * 2)
    )
    assert message == "p.jsonl:2: id [1] occurs twice; ids must be unique"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("first", "second"), [(1, "one"), ("one", 1), ([1], "one"), ({"n": 1}, [1]), (True, "x")]
)
def test_a_column_of_several_types_is_refused(tmp_path: Path, first: Any, second: Any) -> None:
    rows = [{"prompt": "a", "x": first}, {"prompt": "b", "x": second}]
    message = refused(tmp_path, lambda: table(tmp_path, *rows))
    assert message.startswith("prompts.source: p.jsonl: column x holds values of several types: ")
    assert message.endswith("(first at p.jsonl:2)")


def test_a_column_that_parquet_cannot_hold_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda: table(tmp_path, {"prompt": "a", "meta": {}}))
    assert message.startswith("prompts.source: p.jsonl: Cannot write struct type 'meta' with no child field")


# ---- long prompts ----

LONG = [{"prompt": "a" * length} for length in (3, 6, 5, 7, 4)]


def write_long(folder: Path) -> None:
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LONG))


def test_a_prompt_longer_than_the_context_leaves_room_for_is_an_error(tmp_path: Path) -> None:
    write_long(tmp_path)
    message = refused(tmp_path, lambda: prepared(opened(tmp_path), room=5))
    assert message == (
        "p.jsonl:2: prompt of 6 tokens, but the context leaves room for 5 beside max_new_tokens;"
        " shorten it, or set prompts.on_long_prompt: skip"
    )


def test_skipped_prompts_are_counted_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    write_long(tmp_path)
    run = opened(tmp_path, on_long_prompt="skip")
    manifest = prepared(run, room=5)
    assert manifest.summary == {  # left out: 6 and 7 characters
        "skipped": 2,
        "longest_prompt_tokens": 5,
        "source": "p.jsonl",
    }
    data = run.read("prompts", None)
    assert data["prompt_id"].to_pylist() == [0, 2, 4]  # row numbers of the source
    assert data["prompt"].to_pylist() == ["aaa", "aaaaa", "aaaa"]  # whole: never cut


def test_when_every_prompt_is_skipped_there_is_none_left(tmp_path: Path) -> None:
    write_long(tmp_path)
    message = refused(tmp_path, lambda: prepared(opened(tmp_path, on_long_prompt="skip"), room=2))
    assert message == "prompts.source: p.jsonl: holds no prompt that can be used"


def test_without_a_limit_every_prompt_fits(tmp_path: Path) -> None:
    write_long(tmp_path)
    assert prepared(opened(tmp_path), room=None).rows == 5


# ---- shards ----


def test_more_rows_than_a_shard_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{n}", "id": n, "x": n if n % 2 else None} for n in range(7)]
    whole = table(tmp_path, *rows)
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 3)
    (tmp_path / "cut").mkdir()
    assert table(tmp_path / "cut", *rows).equals(whole)
    manifest = opened(tmp_path / "cut").manifest("prompts", None)
    assert manifest is not None
    assert [file.rows for file in manifest.files] == [3, 3, 1]


def test_ids_are_unique_across_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 2)
    rows = [{"prompt": "a", "id": n} for n in (0, 1, 2, 3, 1)]
    message = refused(tmp_path, lambda: table(tmp_path, *rows))
    assert message == "p.jsonl:5: id 1 occurs twice; ids must be unique"


def test_a_column_that_begins_in_a_later_shard_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 2)
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "late": 1}]
    message = refused(tmp_path, lambda: table(tmp_path, *rows))
    assert message == (
        "prompts.source: p.jsonl: column late is of type int64 only behind the first 2 rows;"
        " give every row the same columns, of the same types"
    )


@pytest.mark.parametrize(
    ("first", "later", "found"),
    [(1, 1.5, "double"), ({"n": 1}, {"n": 1, "m": 2}, "struct<n: int64, m: int64>"), (None, "a", "string")],
)
def test_a_type_that_widens_in_a_later_shard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Any, later: Any, found: str
) -> None:
    # pyarrow alone would write 1 for 1.5, and leave "m" out.
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 1)
    rows = [{"prompt": "a", "x": first}, {"prompt": "b", "x": later}]
    message = refused(tmp_path, lambda: table(tmp_path, *rows))
    assert message == (
        f"prompts.source: p.jsonl: column x is of type {found} only behind the first 1 rows;"
        " give every row the same columns, of the same types"
    )


def test_a_type_that_changes_in_a_later_shard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 1)
    rows = [{"prompt": "a", "x": "one"}, {"prompt": "b", "x": 1}]
    message = refused(tmp_path, lambda: table(tmp_path, *rows))
    assert message.startswith(
        "prompts.source: p.jsonl: Unable to merge: Field x has incompatible types: string vs int64"
    )


def test_a_narrower_value_in_a_later_shard_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 1)
    values: list[Any] = [1.5, 1, None]
    rows = [{"prompt": "a", "x": value, "tags": ["t"] if value == 1.5 else []} for value in values]
    data = table(tmp_path, *rows)
    assert data["x"].to_pylist() == values
    assert data["tags"].to_pylist() == [["t"], [], []]


def test_a_shard_of_skipped_prompts_takes_no_column_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_ROWS_PER_SHARD", 2)
    rows = [{"prompt": "a" * length, "x": length} for length in (9, 8, 1, 9, 9, 9, 2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = opened(tmp_path, on_long_prompt="skip")
    manifest = prepared(run, room=5)
    assert [file.rows for file in manifest.files] == [1, 1]
    data = run.read("prompts", None)
    assert data["prompt_id"].to_pylist() == [2, 6]
    assert data["x"].to_pylist() == [1, 2]


def test_a_prompt_of_no_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    run = opened(tmp_path)
    message = refused(tmp_path, lambda: prepare(run, Staging(run, prompts.plan(run), 0), lambda _: [0], None))
    assert message == "p.jsonl:1: its prompt is no tokens; give the model some text"


# ---- what the table depends on ----


def test_a_revision_counts_where_it_is_given_and_nowhere_else() -> None:
    config = {"source": "owner/name", "split": "test"}
    assert "revision" not in PromptsConfig.model_validate(config).recorded()  # fingerprints of before it hold
    assert PromptsConfig.model_validate({**config, "revision": "v1"}).recorded()["revision"] == "v1"


def test_content_counts_and_the_file_s_name_does_not(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    manifest = prepared(opened(tmp_path))
    (tmp_path / "p.jsonl").rename(tmp_path / "moved.jsonl")
    assert prompts.plan(opened(tmp_path, source="moved.jsonl")).same_as(manifest)
    assert prompts.plan(opened(tmp_path, source="moved.jsonl", chat=True)).differences(manifest) == [
        "prompts.chat: false -> true"
    ]
    (tmp_path / "moved.jsonl").write_text('{"prompt": "b"}\n')
    changed = prompts.plan(opened(tmp_path, source="moved.jsonl"))
    assert changed.differences(manifest) == ["prompts.source: its file changed"]


# ---- draw ----


@pytest.mark.parametrize(("num_prompts", "count"), [(7, 3), (3, 7), (5, 5), (1, 4), (6, 4)])
def test_every_prompt_is_drawn_exactly_once_a_pass(num_prompts: int, count: int) -> None:
    positions = np.concatenate([draw(num_prompts, 0, iteration, count) for iteration in range(num_prompts)])
    passes = positions.reshape(count, num_prompts)  # num_prompts * count draws: `count` passes
    for one in passes:
        assert sorted(one.tolist()) == list(range(num_prompts))


def test_passes_have_orders_of_their_own() -> None:
    first, second, third = (draw(50, 0, number, 50).tolist() for number in range(3))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert first != list(range(50))  # shuffled, not as they stand in the file
    # Of 50 places about one agrees by chance; a rotated or reused order would agree in none or all.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_a_seed_and_an_iteration_say_what_is_drawn() -> None:
    forwards = [draw(10, 3, iteration, 4).tolist() for iteration in range(8)]
    backwards = [draw(10, 3, iteration, 4).tolist() for iteration in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert [draw(10, 4, iteration, 4).tolist() for iteration in range(8)] != forwards
    # Iteration i takes positions 4 i onwards, so halves of the size are halves of the draws.
    halves = [draw(10, 3, iteration, 2).tolist() for iteration in range(16)]
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == forwards


def test_draws_are_what_they_were() -> None:
    # A run that goes on under another version must draw the same: numpy's own numbers, written down.
    assert draw(5, 0, 0, 5).tolist() == [2, 4, 3, 0, 1]
    assert draw(5, 0, 1, 5).tolist() == [1, 4, 3, 0, 2]
    assert draw(5, 0, 0, 5).dtype == np.int64


# ---- what the model sees ----


def test_text_is_seen_as_it_is_and_messages_through_the_template() -> None:
    tokenizer = starter_model.build_tokenizer()
    text = {"prompt": " 3+4=\n", "messages": None}
    chat = {"prompt": None, "messages": [{"role": "user", "content": "3+4="}]}
    texts, token_ids = encode([text, chat], tokenizer, Chat())
    assert texts == [" 3+4=\n", "user: 3+4=\nassistant: "]
    assert token_ids == [list(shown.encode()) for shown in texts]  # a token is a byte


def test_a_template_s_special_tokens_are_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    # Like Llama's: the tokenizer puts a token before every text (here end-of-sequence, 256), and so does
    # the template.
    tokenizer = starter_model.build_tokenizer()
    template: Any = TemplateProcessing(
        single=f"{starter_model.EOS} $A", special_tokens=[(starter_model.EOS, 256)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.chat_template = "{{ eos_token }}{{ messages[0].content }}"
    chat = {"prompt": None, "messages": [{"role": "user", "content": "a"}]}
    _, token_ids = encode([{"prompt": "a", "messages": None}, chat], tokenizer, Chat())
    assert token_ids == [[256, 97], [256, 97]]


def test_messages_need_a_chat_template() -> None:
    tokenizer = starter_model.build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError) as caught:
        encode([{"prompt": None, "messages": [{"role": "user", "content": "a"}]}], tokenizer, Chat())
    assert str(caught.value) == (
        "prompts: are chat messages, but the model's tokenizer has no chat template; give one:"
        " prompts.chat_template"
    )


def test_the_configuration_says_what_it_is_by_default() -> None:
    config = PromptsConfig(source="p.jsonl")
    assert (config.chat, config.system, config.on_long_prompt) == (False, None, "error")


@pytest.mark.parametrize("name", ["group_id", "run", "completions", "Run", "Prompt_ID"])
def test_a_column_with_a_name_of_the_pipelines_own_is_refused(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, lambda: table(tmp_path, {"prompt": "a", name: 1}))
    assert message == f"p.jsonl:1: column {name} is the pipeline's own; give yours another name, such as id"


@pytest.mark.parametrize("name", ["system", "user"])
def test_a_system_message_of_its_own_and_one_of_the_configuration_clash(tmp_path: Path, name: str) -> None:
    row = {"messages": [{"role": name, "content": "a"}, {"role": "user", "content": "b"}]}
    if name == "user":
        assert len(table(tmp_path, row, system="Be brief.")["messages"].to_pylist()[0]) == 3
        return
    text = refused(tmp_path, lambda: table(tmp_path, row, system="Be brief."))
    assert text == "p.jsonl:1: begins with a system message of its own; leave prompts.system out"


def test_a_prompt_that_is_a_list_of_messages_as_trl_has_it(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    data = table(tmp_path, {"prompt": messages, "answer": "1"}, {"prompt": "text", "answer": "2"})
    assert data.to_pylist() == [
        FIXED | {"messages": messages, "answer": "1"},
        FIXED | {"prompt_id": 1, "prompt": "text", "answer": "2"},
    ]
    (tmp_path / "empty").mkdir()
    text = refused(tmp_path / "empty", lambda: table(tmp_path / "empty", {"prompt": []}))
    assert text == "p.jsonl:1: prompt must be a list of {role, content} that is not empty"


@pytest.mark.parametrize("config", [{"chat_template": "t"}, {"chat_template_arguments": {"a": 1}}])
def test_a_chat_template_without_a_chat_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "t").write_text("{{ messages }}")
    with pytest.raises(UsageError) as caught:
        table(tmp_path, {"prompt": "a"}, **config)
    [key] = config
    text = f"prompts.{key}: no prompt is a chat; set prompts.chat: true, or leave it out"
    assert str(caught.value) == text


def test_the_chat_template_is_part_of_what_the_table_depends_on(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "t").write_text("{{ messages }}")
    settings = {"chat": True, "chat_template": "t"}
    manifest = prepared(opened(tmp_path, **settings))
    assert prompts.plan(opened(tmp_path, **settings)).same_as(manifest)
    (tmp_path / "t").write_text("{{ messages[0].content }}")
    changed = prompts.plan(opened(tmp_path, **settings)).differences(manifest)
    assert changed == ["prompts.chat_template: its file changed"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"split": "test"}, "split: p.jsonl has no splits; leave it out, or name a data set"),
        ({"subset": "main"}, "subset: p.jsonl has no subsets; leave it out, or name a data set"),
        ({"revision": "v1"}, "revision: p.jsonl has no revisions; leave it out, or name a data set"),
        (
            {"chat_template_arguments": {"tokenize": True}},
            "tokenize is the pipeline's own; give the template's, such as enable_thinking",
        ),
        ({"chat_template_arguments": {"a": float("nan")}}, "may hold text, finite numbers"),
    ],
)
def test_keys_that_mean_nothing_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PromptsConfig(source="p.jsonl", **config)
    assert message in str(caught.value)
