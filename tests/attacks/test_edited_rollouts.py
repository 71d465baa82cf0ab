"""Rollouts and rewards that a hand has edited and sealed: whoever reads them refuses them by their key."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo

from grpo import tables
from grpo.artifacts import MANIFEST, id_of, seal
from grpo.artifacts.manifest import FileRecord, read_manifest

ITERATION = Path("artifacts/tiny/iteration=000001")
Rows = list[dict[str, Any]]


def reseal(output: str, table: str, edit: Callable[[Rows], object]) -> str:
    """Edit the rows of a table in its last file, and make its manifest say that they always were so."""
    folder = ITERATION / output
    manifest = read_manifest(folder)
    assert manifest is not None
    document = manifest.model_dump()
    record = [file for file in document["files"] if file["table"] == table][-1]
    path = folder / record["name"]
    rows = pq.read_table(path).to_pylist()
    edit(rows)
    content = tables.encode(pa.Table.from_pylist(rows, schema=tables.schema(table)))
    path.write_bytes(content)
    document["rows"] += len(rows) - record["rows"]
    record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": len(rows)}
    files = [FileRecord.model_validate(file) for file in document["files"]]
    if output == "rollouts":
        document["ids"]["rollouts"] = id_of(files)
    (folder / MANIFEST).write_bytes(seal(document))
    return str(document["ids"].get("rollouts", ""))


def follow(output: str, rollouts_id: str) -> None:
    """Have an output say that it was made from these rollouts."""
    path = ITERATION / output / MANIFEST
    document = json.loads(path.read_text())
    del document["sha256"]
    document["inputs"]["rollouts@1"] = rollouts_id
    path.write_bytes(seal(document))


def put(column: str, value: Any) -> Callable[[Rows], object]:
    """Another value in the last row."""
    return lambda rows: rows[-1].update({column: value(rows[-1][column]) if callable(value) else value})


def changed(index: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    """A list with another item."""
    return lambda items: [*items[:index], value, *items[index + 1 :]]


KEY = "(iteration, group_id, sample_id) (1, 2, 1)"
EDITS: dict[str, tuple[Callable[[Rows], object], str]] = {
    "a token beyond the vocabulary": (put("response_token_ids", changed(1, 10**6)), "outside the vocabulary"),
    "a negative token": (put("response_token_ids", changed(0, -1)), "outside the vocabulary"),
    "a prompt's token": (put("prompt_token_ids", changed(0, 258)), "outside the vocabulary"),
    "a null token": (put("response_token_ids", changed(0, None)), "outside the vocabulary"),
    "a log-prob above 0": (put("old_logprobs", changed(2, 500.0)), "not finite or above 0"),
    "a log-prob of -inf": (put("old_logprobs", changed(0, float("-inf"))), "not finite or above 0"),
    "a log-prob of nan": (put("old_logprobs", changed(0, float("nan"))), "not finite or above 0"),
    "a null log-prob": (put("old_logprobs", changed(0, None)), "not finite or above 0"),
    "null log-probs": (put("old_logprobs", None), "old_logprobs is null"),
    "fewer log-probs": (put("old_logprobs", lambda x: x[1:]), "old_logprobs has not one value"),
    "more of the mask": (put("response_mask", lambda x: [*x, True]), "response_mask has not one value"),
    "fewer tokens": (put("response_token_ids", lambda x: x[1:]), "has not one value per token"),
    "another length": (put("response_tokens", 3), "response_tokens is not the number"),
    "a temperature of 0": (put("temperature", 0.0), "temperature is not finite"),
    "a temperature of nan": (put("temperature", float("nan")), "temperature is not finite"),
    "a row is missing": (lambda rows: rows.pop(), "rows are missing"),
    "a row twice": (lambda rows: rows.append(dict(rows[-1])), "there twice"),
    "a row of another iteration": (put("iteration", 0), "or of others"),
    "a row for another": (lambda rows: rows[-1].update(rows[-2]), "there twice"),
    "a group too many": (lambda rows: rows.append({**rows[-1], "group_id": 3}), "no more rows are expected"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("stage", ["score", "advantage", "update"])
def test_edited_rollouts_are_refused_where_they_are_read(
    finished: Path, grpo: Grpo, edit: str, stage: str
) -> None:
    spoil, message = EDITS[edit]
    known = reseal("rollouts", "rollouts", spoil)
    for output in ("rewards", "advantages"):
        follow(output, known)
    before = (ITERATION / "update" / MANIFEST).read_bytes()
    code, _, err = grpo(stage, "--iteration", "1", "--force")
    if edit in ("a prompt's token", "a token beyond the vocabulary") and stage != "update":
        # What 258 is too much for, only the model says.
        assert code in (0, 6)
        return
    if stage == "update" and edit.startswith("a row"):
        assert (code, "error: " in err) == (6, True), err
        return
    assert (code, err.count("error: ")) == (6, 1), err
    assert message in err
    assert KEY in err or "rows are" in err
    assert (ITERATION / "update" / MANIFEST).read_bytes() == before


REWARDS: dict[str, Callable[[Rows], object]] = {
    "a row is missing": lambda rows: rows.pop(),
    "a row twice": lambda rows: rows.append(dict(rows[-1])),
    "a row for another": lambda rows: rows[-1].update(rows[-2]),
    "a row of another group": put("group_id", 7),
    "a row of another reward": put("name", "other"),
}


@pytest.mark.parametrize("edit", REWARDS)
def test_edited_rewards_are_refused(finished: Path, grpo: Grpo, edit: str) -> None:
    reseal("rewards", "rewards", REWARDS[edit])
    code, _, err = grpo("advantage", "--iteration", "1", "--force")
    assert (code, err.count("error: ")) == (6, 1), err
    assert "iteration=000001/rewards: code: " in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_edited_advantages_are_refused(finished: Path, grpo: Grpo, value: float | None) -> None:
    reseal("advantages", "advantages", put("advantage", value))
    code, _, err = grpo("update", "--iteration", "1", "--force")
    assert (code, err.count("error: ")) == (6, 1), err
    assert "is not finite" in err


def test_a_prompt_that_is_not_there(finished: Path, grpo: Grpo) -> None:
    reseal("rollouts", "rollouts", put("prompt_id", 10**6))
    code, _, err = grpo("score", "--iteration", "1", "--force")
    assert (code, "prompt_id 1000000 is no row of prompts" in err) == (6, True)


@pytest.mark.parametrize(("output", "table"), [("rollouts", "rollouts"), ("evaluation", "eval_rollouts")])
@pytest.mark.parametrize("column", ["prompt_token_ids", "response_token_ids"])
@pytest.mark.parametrize("token", [-1, 258, 10**6, 2**31 - 1])
def test_verify_names_a_token_that_no_policy_has(
    measured: Path, grpo: Grpo, output: str, table: str, column: str, token: int
) -> None:
    path = ITERATION / output / MANIFEST
    ids = json.loads(path.read_text())["ids"]
    reseal(output, table, put(column, changed(0, token)))
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_bytes(seal(document | {"ids": ids}))  # so that nothing is stale
    code, out, _ = grpo("verify")
    assert (code, f"broken   {table}: a token outside the vocabulary: 1 rows" in out) == (6, True), out
