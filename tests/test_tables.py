from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo import tables
from grpo.errors import CorruptError

KEY = ["iteration", "group_id", "sample_id"]
# The table list of the design with `judgements` and `teacher_logprobs`, in the order on disk.
NAMES = {
    "prompts": ["prompt_id", "prompt", "messages", "answer"],
    "rollouts": [
        *KEY,
        "prompt_id",
        "round",
        "prompt",
        "response",
        "prompt_token_ids",
        "response_token_ids",
        "old_logprobs",
        "response_mask",
        "finish_reason",
        "response_tokens",
        "policy_iteration",
        "temperature",
        "seed",
    ],
    "rewards": [*KEY, "name", "value", "weight", "status", "error"],
    "judgements": [
        *KEY,
        "name",
        "status",
        "answer",
        "error",
        "model",
        "finish_reason",
        "prompt_tokens",
        "answer_tokens",
        "attempts",
    ],
    "teacher_logprobs": [*KEY, "name", "logprobs", "gap"],
    "advantages": [
        *KEY,
        "reward",
        "group_mean",
        "group_std",
        "group_size",
        "advantage",
        "keep",
        "reason",
    ],
    "updates": [
        "iteration",
        "epoch",
        "step",
        "loss",
        "policy_loss",
        "kl",
        "entropy",
        "ratio_mean",
        "ratio_max",
        "clip_fraction_low",
        "clip_fraction_high",
        "grad_norm",
        "learning_rate",
        "rollouts",
        "tokens",
        "skipped",
        "mismatch_mean",
        "mismatch_max",
        "mismatch_kl",
        "effective_sample_size",
        "over_cap_fraction",
        "off_policy_fraction",
        "low_entropy_fraction",
        "entropy_coefficient",
    ],
    "logprobs": [
        *KEY,
        "update_iteration",
        "step",
        "policy_logprobs",
        "reference_logprobs",
        "mismatch",
    ],
}
# What policies are measured by has the columns of its sibling.
NAMES |= {f"eval_{name}": NAMES[name] for name in ("prompts", "rollouts", "rewards", "judgements")}
LISTS = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "prompt_token_ids": pa.list_(pa.int32()),
    "response_token_ids": pa.list_(pa.int32()),
    "old_logprobs": pa.list_(pa.float32()),
    "response_mask": pa.list_(pa.bool_()),
    "logprobs": pa.list_(pa.float32()),
    "policy_logprobs": pa.list_(pa.float32()),
    "reference_logprobs": pa.list_(pa.float32()),
}
TYPES = {
    "rollouts": [
        *[*3 * ["int32"], "int64", "int32", "string", "string", *4 * [""]],
        *["string", "int32", "int32", "double", "int64"],
    ],
    "rewards": [*3 * ["int32"], "string", "double", "double", "string", "string"],
    "judgements": [*3 * ["int32"], *6 * ["string"], *3 * ["int32"]],
    "teacher_logprobs": [*3 * ["int32"], "string", "", "double"],
    "advantages": [*3 * ["int32"], *3 * ["double"], "int32", "double", "bool", "string"],
    "updates": [*3 * ["int32"], *10 * ["double"], "int32", "int64", "bool", *8 * ["double"]],
    "logprobs": [*5 * ["int32"], "", "", "double"],
    "prompts": ["int64", "string", "", "string"],
}
TYPES |= {f"eval_{name}": TYPES[name] for name in ("prompts", "rollouts", "rewards", "judgements")}
FILE = Path("part-00000-0123abcd.parquet")


def rewards() -> pa.Table:
    rows = [
        {
            "iteration": 3,
            "group_id": 0,
            "sample_id": 0,
            "name": "a",
            "value": 0.1,
            "weight": 1.0,
            "status": "ok",
        },
        {"iteration": 3, "group_id": 0, "sample_id": 1, "name": "a", "status": "error", "error": "é [/b]"},
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema("rewards"))


def logprobs() -> pa.Table:
    columns = {
        "iteration": [3, 3],
        "group_id": [0, 0],
        "sample_id": [0, 1],
        "update_iteration": [3, 3],
        "step": [0, 0],
        "policy_logprobs": [[-0.5, -0.0, -1e-30], []],
        "reference_logprobs": [[-0.25, -1.0, -2.0], None],
        "mismatch": [0.5, None],
    }
    return pa.table(columns, schema=tables.schema("logprobs"))


def test_tables_and_columns_are_those_of_the_design() -> None:
    assert {name: tables.schema(name).names for name in tables.TABLES} == NAMES
    assert list(tables.TABLES) == list(NAMES)


@pytest.mark.parametrize("table", list(NAMES))
def test_types_are_those_of_the_design(table: str) -> None:
    for field, expected in zip(tables.schema(table), TYPES[table], strict=True):
        assert field.type == LISTS[field.name] if expected == "" else str(field.type) == expected, field.name


def test_every_column_says_what_it_means() -> None:
    assert [
        name for columns in tables.TABLES.values() for name, (_, text) in columns.items() if not text
    ] == []


def test_rows_come_back_with_the_exact_schema() -> None:
    for name, data in (("rewards", rewards()), ("logprobs", logprobs())):
        found = tables.decode(name, [(FILE, tables.encode(data))])
        assert found.schema.equals(tables.schema(name))
        assert found.to_pylist() == data.to_pylist()


def test_files_come_back_in_the_order_given_and_columns_as_asked_for() -> None:
    first, second = rewards().slice(1), rewards().slice(0, 1)
    files = [(FILE, tables.encode(first)), (FILE, tables.encode(second))]
    assert tables.decode("rewards", files)["sample_id"].to_pylist() == [1, 0]
    found = tables.decode("rewards", files, ["value", "name"])
    assert found.to_pylist() == [{"value": None, "name": "a"}, {"value": 0.1, "name": "a"}]


def test_no_files_are_an_empty_table() -> None:
    assert tables.decode("rewards", []).schema.equals(tables.schema("rewards"))
    assert tables.decode("rewards", [], ["name"]).schema.names == ["name"]


def test_equal_rows_give_equal_bytes_however_they_were_put_together() -> None:
    data = rewards()
    in_pieces = pa.concat_tables([data.slice(0, 1), data.slice(1)])
    assert in_pieces["name"].num_chunks == 2
    assert tables.encode(in_pieces) == tables.encode(data) == tables.encode(rewards())
    changed = data.set_column(4, "value", pa.array([0.1000001, None]))
    assert tables.encode(changed) != tables.encode(data)


def test_a_file_is_one_row_group_of_zstd_with_dictionaries_for_scalars_only(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(tables.encode(logprobs()))
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 1
    columns = [metadata.row_group(0).column(index) for index in range(metadata.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    plain = [c.path_in_schema for c in columns if not c.has_dictionary_page]
    assert plain == ["policy_logprobs.list.element", "reference_logprobs.list.element"]


@pytest.mark.parametrize("missing", [[], ["off_policy_fraction"], ["low_entropy_fraction"], None])
def test_a_column_that_no_key_fills_may_be_missing_and_reads_as_null(missing: list[str] | None) -> None:
    optional = tables.OPTIONAL["updates"]
    without = optional if missing is None else missing
    row = {"iteration": 1, "loss": 0.5, **dict.fromkeys(optional, 0.25)}
    data = pa.Table.from_pylist([row], schema=tables.schema("updates", without=without))
    files = [(FILE, tables.encode(data))]
    found = tables.decode("updates", files)
    assert found.schema.equals(tables.schema("updates"))
    shown = {name: None if name in without else row[name] for name in optional}
    assert found.select(list(optional)).to_pylist() == [shown]
    assert tables.decode("updates", files, ["loss", *optional]).to_pylist() == [{"loss": 0.5, **shown}]
    with pytest.raises(CorruptError, match="see column loss"):
        tables.decode("updates", [(FILE, tables.encode(data.drop_columns(["loss"])))])


def test_prompts_may_have_columns_of_the_user_and_no_other_table_may() -> None:
    row = {"prompt_id": 0, "prompt": "1+1=", "messages": None, "answer": "2"}
    prompts = pa.Table.from_pylist([row], schema=tables.schema("prompts"))
    own = prompts.append_column("level", pa.array([7]))
    assert tables.decode("prompts", [(FILE, tables.encode(own))]).to_pylist() == [{**row, "level": 7}]
    more = rewards().append_column("level", pa.array([7, 7]))
    with pytest.raises(CorruptError) as caught:
        tables.decode("rewards", [(FILE, tables.encode(more))])
    assert str(caught.value) == f"{FILE}: schema is not that of table rewards: see column level"


@pytest.mark.parametrize(
    ("data", "column"),
    [
        (rewards().drop_columns(["value"]), "value"),
        (rewards().cast(tables.schema("rewards").set(4, pa.field("value", pa.float32()))), "value"),
        (rewards().rename_columns([*KEY, "reward", "value", "weight", "status", "error"]), "name"),
        (logprobs(), "name"),
    ],
)
def test_another_schema_is_refused(data: pa.Table, column: str) -> None:
    with pytest.raises(CorruptError) as caught:
        tables.decode("rewards", [(FILE, tables.encode(data))])
    assert caught.value.exit_code == 6
    assert str(caught.value) == f"{FILE}: schema is not that of table rewards: see column {column}"


@pytest.mark.parametrize("length", [0, 3, 100, -1])
def test_a_truncated_file_is_refused(length: int) -> None:
    content = tables.encode(rewards())[:length]
    with pytest.raises(CorruptError, match=f"^{FILE}: cannot be read as Parquet: "):
        tables.decode("rewards", [(FILE, content)])


def test_a_flipped_byte_in_the_data_is_refused() -> None:
    data = logprobs()
    content = bytearray(tables.encode(data))
    column = pq.read_metadata(pa.BufferReader(bytes(content))).row_group(0).column(5)
    assert column.path_in_schema == "policy_logprobs.list.element"
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1  # the last byte of its values
    with pytest.raises(CorruptError, match=f"^{FILE}: cannot be read as Parquet: .*CRC"):
        tables.decode("logprobs", [(FILE, bytes(content))])
