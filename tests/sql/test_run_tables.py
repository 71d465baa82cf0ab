"""Tables of a run as queries see them: opened when they are scanned, and checked then."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo

from grpo import sql
from grpo.artifacts import MANIFEST, ActiveRun, Run, seal
from grpo.artifacts.files import sha256_of
from grpo.config import load
from grpo.console import Console
from grpo.errors import CorruptError

COUNT = "select count(*) as n from rewards"
FIRST = Path("artifacts/tiny/iteration=000000")


@pytest.fixture
def run(finished: Path) -> ActiveRun:
    return ActiveRun(Path("artifacts"), load(Path("pipeline.yaml")), Path(), Console(quiet=True))


def file_of(output: str) -> Path:
    return next((FIRST / output).glob("*.parquet"))


def put(path: Path, data: pa.Table) -> None:
    """Other rows in place of a file, as if its stage had committed them."""
    pq.write_table(data, path)
    place = path.parent / MANIFEST
    manifest = json.loads(place.read_text())
    del manifest["sha256"]
    for file in manifest["files"]:
        if file["name"] == path.name:
            file |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    place.write_bytes(seal({**manifest, "fingerprint": "f" * 64}))


def test_a_query_opens_the_tables_it_scans_and_no_others(run: ActiveRun, grpo: Grpo) -> None:
    for path in FIRST.rglob("*.parquet"):
        if path.parent.name != "rewards":
            path.unlink()
    for path in FIRST.rglob("timings.json"):
        path.write_text("{")
    (FIRST / "update" / MANIFEST).write_text("{")
    [row] = sql.read([run], COUNT).to_pylist()
    assert row["n"] > 0
    # None of these needs a row of another table.
    for statement in ("describe samples", "show tables", "select rewards from samples limit 0"):
        sql.read([run], statement)
    for statement, damage in (
        ("select * from query_table('advantages')", "missing, though its manifest lists it"),
        ("select * from rollouts", "missing, though its manifest lists it"),
        ("select * from updates", "is not JSON"),
        ("select * from timings", "is not JSON"),
    ):
        code, out, err = grpo("sql", statement)
        assert (code, out) == (6, "")
        assert damage in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda data: data.cast(data.schema.set(4, pa.field("value", pa.float32()))), "value"),
        (lambda data: data.drop_columns(["weight"]), "weight"),
        (lambda data: data.append_column("level", data["value"]), "level"),
    ],
)
def test_no_column_is_cast_or_filled(
    run: ActiveRun, change: Callable[[pa.Table], pa.Table], column: str
) -> None:
    path = file_of("rewards")
    put(path, change(pq.read_table(path)))
    with pytest.raises(CorruptError) as caught:
        sql.read([run], COUNT)
    assert str(caught.value) == f"{path}: schema is not that of table rewards: see column {column}"


def test_a_file_damaged_where_only_a_scan_reads_is_named(run: Run, grpo: Grpo) -> None:
    path = file_of("rewards")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # the first page; its footer is whole
    path.write_bytes(content)
    code, _, err = grpo("sql", "select * from rewards")
    assert (code, err) == (6, f"error: {path}: content changed since it was committed (sha256 differs)\n")


def test_what_is_replaced_while_it_is_read_is_read_again(run: ActiveRun) -> None:
    path = file_of("rewards")
    data = pq.read_table(path)
    before = sql.read([run], COUNT)["n"][0].as_py()
    found = []

    def twice(connection: sql.Connection) -> int:
        found.append(sql.query(connection, COUNT)["n"][0].as_py())
        if len(found) == 1:
            put(path, data.slice(0, 1))
        return int(found[-1])

    assert sql.snapshot([run], twice) == before - len(data) + 1
    assert found == [before, before - len(data) + 1]


def test_a_connection_turns_to_another_iteration(run: ActiveRun) -> None:
    statement = "select distinct iteration from rewards"
    with sql.connect([run], 0) as connection:
        assert sql.query(connection, statement)["iteration"].to_pylist() == [0]
        seven = (
            pq.read_table(file_of("rewards"))
            .slice(0, 1)
            .set_column(0, "iteration", pa.array([7], pa.int32()))
        )
        sql.register(connection, "_rewards_0", seven)
        assert sql.query(connection, statement)["iteration"].to_pylist() == [7]
        sql.show_iteration(connection, 1)
        assert sql.query(connection, statement)["iteration"].to_pylist() == [1]
