"""What `grpo verify` finds, and that what it sets aside is made again with the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo
from tests.faults import crash

from grpo import tables
from grpo.artifacts.manifest import digest

RUN = crash.RUN


def verify(grpo: Grpo, *options: str) -> tuple[int, dict[str, Any]]:
    code, out, err = grpo("verify", "--json", *options)
    assert err == ""
    document: dict[str, Any] = json.loads(out)
    assert document["exit"] == code
    return code, document


def test_a_whole_run(finished: Path, grpo: Grpo) -> None:
    code, found = verify(grpo)
    # Two iterations of four outputs; prompts, policy.
    assert (code, found["outputs"], found["damaged"], found["broken"], found["stale"]) == (0, 10, [], {}, [])
    files = [path for path in RUN.rglob("*") if path.is_file() and ".lock" not in path.name]
    ours = {"manifest.json", "timings.json", "run.json"}
    assert found["files"] == len([path for path in files if path.name not in ours])
    rows = sum(pq.read_metadata(path).num_rows for path in RUN.rglob("*.parquet"))
    assert found["rows"] == rows
    code, out, _ = grpo("verify")
    assert (code, out.splitlines()[-1].split(":")[0]) == (0, "run tiny")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_is_named_with_what_to_do(finished: Path, grpo: Grpo) -> None:
    [path] = (RUN / "iteration=000001/advantages").glob("*.parquet")
    flip(path)
    code, found = verify(grpo)
    message = f"{path}: content changed since it was committed (sha256 differs)"
    redo = "grpo advantage --iteration 1"
    assert (code, found["damaged"]) == (
        6,
        [{"output": "advantages", "iteration": 1, "found": message, "redo": redo}],
    )
    _, out, _ = grpo("verify")
    assert out.splitlines()[0] == f"damaged  {message}"
    assert out.splitlines()[-1] == f"`grpo verify --discard` moves it to .trash; what makes it again: {redo}"
    assert path.exists()
    code, _ = verify(grpo, "--discard")
    assert code == 6
    assert not path.exists()
    assert verify(grpo)[0] == 0
    assert grpo(*redo.split()[1:])[0] == 0
    assert verify(grpo)[1]["outputs"] == 10


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None], table: str) -> None:
    """Change rows of a committed table and everything that vouches for it: only an invariant can tell."""
    import hashlib

    import pyarrow as pa

    rows = pq.read_table(path).to_pylist()
    change(rows)
    content = tables.encode(pa.Table.from_pylist(rows, schema=tables.schema(table)))
    path.write_bytes(content)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    for record in manifest["files"]:
        if record["name"] == path.name:
            record |= {
                "bytes": len(content),
                "rows": len(rows),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    del manifest["sha256"]
    (path.parent / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


BROKEN: list[tuple[str, str, Callable[[list[dict[str, Any]]], None]]] = [
    ("rollouts", "rollouts: a key stands twice", lambda rows: rows.append(rows[0])),
    (
        "rollouts",
        "rollouts: lists are not as long as the response",
        lambda rows: rows[0]["old_logprobs"].pop(),
    ),
    (
        "rollouts",
        "rollouts: a log-prob is not finite, or above 0",
        lambda rows: rows[0]["old_logprobs"].__setitem__(0, 0.5),
    ),
    ("rewards", "rewards: a key stands twice", lambda rows: rows.append(rows[0])),
    ("rewards", "rewards: not one row per rollout and reward", lambda rows: rows.__delitem__(0)),
    (
        "rewards",
        "rewards: a value without status ok, or the reverse",
        lambda rows: rows[0].__setitem__("status", "error"),
    ),
    ("advantages", "advantages: not one row per rollout", lambda rows: rows.__delitem__(0)),
    (
        "advantages",
        "advantages: kept without an advantage, or the reverse",
        lambda rows: rows[0].__setitem__("keep", not rows[0]["keep"]),
    ),
    ("updates", "updates: steps are not 0, 1, 2 ... once each", lambda rows: rows.append(rows[0])),
    (
        "logprobs",
        "logprobs: of a rollout that is not kept",
        lambda rows: rows[0].__setitem__("sample_id", 99),
    ),
]


@pytest.mark.parametrize(("table", "invariant", "change"), BROKEN)
def test_a_table_that_cannot_be_right_breaks_an_invariant(
    finished: Path, grpo: Grpo, table: str, invariant: str, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    output = "update" if table in ("updates", "logprobs") else table
    pattern = f"{table}-*.parquet" if output == "update" else "*.parquet"
    path = sorted((RUN / "iteration=000001" / output).glob(pattern))[0]
    rewrite(path, change, table)
    code, found = verify(grpo)
    assert code == 6
    assert invariant in found["broken"]


def test_what_is_stale_is_said_and_no_damage(finished: Path, grpo: Grpo) -> None:
    assert grpo("score", "--iteration", "0", "--force", "--set", crash.NEW_REWARD)[0] == 0
    code, found = verify(grpo)
    assert (code, found["damaged"], found["broken"]) == (0, [], {})
    assert found["stale"][0].startswith("advantage of iteration 0: reward/")
