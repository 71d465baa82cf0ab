"""What `grpo verify` finds, and that what it sets aside is made again with the same bytes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo
from tests.faults import crash

from grpo import tables
from grpo.artifacts.manifest import SCHEMA_VERSION, digest

RUN = crash.RUN


def verify(grpo: Grpo, *options: str) -> tuple[int, dict[str, Any]]:
    code, out, err = grpo("verify", "--json", *options)
    assert err == ""
    document: dict[str, Any] = json.loads(out)
    assert document["exit"] == code
    return code, document


def test_a_whole_run(finished: Path, grpo: Grpo) -> None:
    code, found = verify(grpo)
    # Two iterations of four outputs and a checkpoint; prompts, policy.
    assert (code, found["outputs"], found["damaged"], found["broken"], found["stale"]) == (0, 12, [], {}, [])
    files = [path for path in RUN.rglob("*") if path.is_file() and ".lock" not in path.name]
    ours = {"manifest.json", "timings.json", "run.json"}
    assert found["files"] == len([path for path in files if path.name not in ours])
    rows = sum(pq.read_metadata(path).num_rows for path in RUN.rglob("*.parquet"))
    assert found["rows"] == rows
    code, out, _ = grpo("verify")
    assert (code, out.splitlines()[-2].split(":")[0]) == (0, "run tiny")


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
        [{"found": message, "redo": redo}],
    )
    _, out, _ = grpo("verify")
    assert out.splitlines()[0] == f"damaged  {message}"
    assert out.splitlines()[-2:] == [
        "`grpo verify --discard` moves it to .trash",
        f"to rebuild it, with the configuration of run tiny: {redo}",
    ]
    assert path.exists()
    code, _ = verify(grpo, "--discard")
    assert code == 6
    assert not path.exists()
    code, found = verify(grpo)
    gone = {"found": f"{path.parent}: gone, though update of iteration 1 was made from it", "redo": redo}
    assert (code, found["damaged"]) == (6, [gone])
    assert grpo(*redo.split()[1:])[0] == 0
    assert verify(grpo)[1]["outputs"] == 12


@pytest.mark.parametrize("gone", ["iteration=000000", "iteration=000000/update", "policy", "prompts"])
def test_what_is_gone_though_it_was_read_is_damage(finished: Path, grpo: Grpo, gone: str) -> None:
    before = crash.contents(Path())
    shutil.rmtree(RUN / gone)
    code, found = verify(grpo)
    assert code == 6
    assert all(": gone, though " in damage["found"] for damage in found["damaged"])
    for damage in found["damaged"]:
        assert grpo(*damage["redo"].split()[1:])[0] == 0
    assert verify(grpo)[0] == 0
    assert crash.contents(Path()) == before


KEEP_2 = ["--set", crash.KEEP_2, "--set", "iterations=5"]  # policies 0, 4 and 5 are on disk


def long_run(grpo: Grpo) -> dict[str, str]:
    assert grpo("run", *KEEP_2)[0] == 0
    return crash.contents(Path())


def test_what_was_lost_far_behind_is_made_again_by_a_replay(finished: Path, grpo: Grpo) -> None:
    before = long_run(grpo)
    flip(RUN / "iteration=000002/rewards/manifest.json")
    [rollouts] = (RUN / "iteration=000002/rollouts").glob("part-00000-*.parquet")
    flip(rollouts)
    code, found = verify(grpo, "--discard")
    redo = ["grpo generate --iteration 2", "grpo score --iteration 2"]
    assert (code, [damage["redo"] for damage in found["damaged"]]) == (6, redo)
    code, _, err = grpo("generate", "--iteration", "2", *KEEP_2)
    assert (code, "policy 2 is not on disk: rebuilding it from policy 0 (2 updates, about" in err) == (
        0,
        True,
    )
    assert grpo("score", "--iteration", "2")[0] == 0
    assert verify(grpo)[0] == 0
    assert crash.contents(Path()) == before


def test_what_cannot_be_made_again_stays(finished: Path, grpo: Grpo) -> None:
    long_run(grpo)
    force = ["--iteration", "1", "--force", "--set", "advantage.scale=none"]
    assert grpo("advantage", *force)[0] == 0  # policies 2 and 3 came from what was there before
    [rollouts] = (RUN / "iteration=000003/rollouts").glob("part-00000-*.parquet")
    flip(rollouts)
    code, found = verify(grpo, "--discard")
    assert (code, [damage["redo"] for damage in found["damaged"]]) == (6, [None])
    text = found["damaged"][0]["found"]
    assert "cannot be rebuilt (policy 3 is not on disk, and cannot be rebuilt: update 1 was made from" in text
    assert text.endswith("restore it from a copy, or `grpo run --from 1`")
    assert rollouts.exists()
    code, _, err = grpo("run", "--yes", "--from", "1", *KEEP_2)
    assert code == 0, err
    assert verify(grpo)[0] == 0


def test_lost_prompts_are_no_reason_to_begin_again(finished: Path, grpo: Grpo) -> None:
    [path] = (RUN / "prompts").glob("part-*.parquet")
    flip(path)
    Path("prompts.jsonl").rename("elsewhere.jsonl")
    code, found = verify(grpo, "--discard")
    assert (code, [damage["redo"] for damage in found["damaged"]]) == (6, [None])
    way = "cannot be rebuilt (prompts.source: prompts.jsonl is gone): restore it from a copy"
    assert found["damaged"][0]["found"].endswith(way)
    Path("elsewhere.jsonl").rename("prompts.jsonl")
    before = crash.contents(Path())
    assert verify(grpo, "--discard")[0] == 6
    assert grpo("run")[0] == 0
    assert crash.contents(Path()).keys() == before.keys()
    assert verify(grpo)[0] == 0


@pytest.mark.parametrize("part", ["prompts", "policy"])
def test_what_a_run_stands_on_is_made_again_from_the_same_alone(
    finished: Path, grpo: Grpo, part: str
) -> None:
    source = Path("prompts.jsonl") if part == "prompts" else Path("model/model.safetensors")
    before = source.read_bytes()
    shutil.rmtree(RUN / part)
    assert verify(grpo)[1]["damaged"][0]["redo"] == "grpo run"
    content = bytearray(before)
    content[-4] ^= 1  # the last letter of an answer; a bit of a weight
    source.write_bytes(content)
    code, _, err = grpo("run")
    assert (code, "fixed for the run tiny" in err) == (4, True), err
    source.write_bytes(before)
    assert grpo("run")[0] == 0
    assert verify(grpo)[0] == 0


def test_a_lost_output_behind_policies_on_disk_is_made_again_alone(finished: Path, grpo: Grpo) -> None:
    before = long_run(grpo)
    shutil.rmtree(RUN / "iteration=000002/rewards")
    code, _, err = grpo("run", *KEEP_2)
    assert (code, "`grpo score --iteration 2` rebuilds it" in err) == (4, True), err
    assert verify(grpo)[1]["damaged"][0]["redo"] == "grpo score --iteration 2"
    code, _, err = grpo("score", "--iteration", "2")
    assert (code, "rebuilding" in err) == (0, False)  # it reads no policy
    assert crash.contents(Path()) == before


def test_from_makes_an_iteration_that_is_gone(finished: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    shutil.rmtree(RUN / "iteration=000000")
    assert grpo("run", "--from", "0", "--yes")[0] == 0
    assert crash.contents(Path()) == before


def test_what_cannot_be_read_is_not_called_damaged(finished: Path, grpo: Grpo) -> None:
    path = RUN / "iteration=000001/rollouts/manifest.json"
    path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    code, out, err = grpo("verify", "--discard")
    assert (code, out, "written by a newer grpo" in err) == (4, "", True)
    assert path.exists()


def test_damaged_timings_are_set_aside_with_their_output(finished: Path, grpo: Grpo) -> None:
    (RUN / "iteration=000001/update/timings.json").write_text("x")
    code, found = verify(grpo, "--discard")
    assert (code, [damage["redo"] for damage in found["damaged"]]) == (6, ["grpo update --iteration 1"])
    assert grpo("update", "--iteration", "1")[0] == 0
    assert verify(grpo)[0] == 0


def test_what_the_next_command_finishes_is_not_stale(finished: Path, grpo: Grpo, tmp_path: Path) -> None:
    force = ["score", "--iteration", "0", "--force"]
    operations = crash.recorded(crash.copy(Path(), tmp_path / "copy"), force)
    at = max(n for n, made in enumerate(operations, 1) if "/.trash/" in f"{made.other}")
    assert crash.in_child(Path(), force, f"kill:{at + 3}")[0] == -9  # the old one was moved away
    assert not (RUN / "iteration=000000/rewards").exists()
    code, found = verify(grpo)
    assert (code, found["damaged"], len(found["stale"])) == (0, [], 1)
    assert found["stale"][0].endswith(": written, and moved to its place by the next command")
    assert grpo("run")[0] == 0
    assert verify(grpo)[1]["stale"] == []


def test_outputs_in_each_other_s_place_are_not_set_aside(finished: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    places = [RUN / f"iteration={n:06d}/rollouts" for n in (0, 1)]
    for source, target in ((places[0], Path("t")), (places[1], places[0]), (Path("t"), places[1])):
        source.rename(target)
    code, found = verify(grpo, "--discard")
    assert code == 6
    for damage, place in zip(found["damaged"], reversed(places), strict=True):
        assert damage["found"].endswith(f"; move it to {place}")
    for source, target in ((places[0], Path("t")), (places[1], places[0]), (Path("t"), places[1])):
        source.rename(target)
    assert verify(grpo)[0] == 0
    assert crash.contents(Path()) == before


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "*.sidecar.json", "part-*.parquet"])
def test_unfinished_work_is_looked_at_too(finished: Path, grpo: Grpo, name: str, tmp_path: Path) -> None:
    before = crash.contents(Path())
    force = ["score", "--iteration", "0", "--force"]
    until = "/.trash/" if name == "manifest.json" else "timings.json"
    operations = crash.recorded(crash.copy(Path(), tmp_path / "copy"), force)
    at = next(n for n, made in enumerate(operations, 1) if until in f"{made.path} {made.other}")
    assert crash.in_child(Path(), force, f"kill:{at}")[0] == -9
    path = next((RUN / ".staging").rglob(name))
    flip(path)
    code, _, err = grpo(*force[:3])
    assert (code, str(path.parent) in err) == (6, True), err
    code, found = verify(grpo, "--discard")
    assert (code, [damage["redo"] for damage in found["damaged"]]) == (6, ["grpo score --iteration 0"])
    assert not path.exists()
    assert grpo("run")[0] == 0
    assert verify(grpo)[0] == 0
    assert crash.contents(Path()) == before


def test_a_damaged_intent_is_set_aside(finished: Path, grpo: Grpo) -> None:
    (RUN / ".from.json").write_text("{")
    code, _, err = grpo("run")
    assert (code, str(RUN / ".from.json") in err) == (6, True)
    assert verify(grpo, "--discard")[0] == 6
    assert verify(grpo)[0] == grpo("run")[0] == 0


def test_what_a_run_stands_on_outlives_its_run_json(finished: Path, grpo: Grpo) -> None:
    flip(RUN / "run.json")
    other = ["--set", "run=another"]
    assert grpo("run", *other)[0] == 0
    code, _, err = grpo("verify", "tiny", *other)
    way = "with its pipeline.yaml, `grpo verify -c FILE --set run=tiny --discard` sets it aside"
    assert (code, err.strip().endswith(way)) == (6, True)
    assert grpo("verify", "--set", "run=tiny", "--discard")[0] == 6
    for change in ("seed=5", "prompts.columns.answer=prompt"):
        code, _, err = grpo("run", "--set", change)
        assert (code, "fixed for the run tiny" in err) == (4, True), err
    assert grpo("run")[0] == grpo("verify")[0] == 0


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None], table: str) -> None:
    """Change rows of a committed table and everything that vouches for it: only an invariant can tell."""
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
    ("rollouts", "rollouts: a key occurs twice", lambda rows: rows.append(rows[0])),
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
    ("rewards", "rewards: a key occurs twice", lambda rows: rows.append(rows[0])),
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


@pytest.mark.parametrize("place", ["iteration=000001", ".trash", ".staging"])
def test_a_file_where_a_folder_belongs(finished: Path, grpo: Grpo, place: str) -> None:
    shutil.rmtree(RUN / place, ignore_errors=True)
    (RUN / place).write_text("x")
    code, found = verify(grpo)
    message = f"{RUN / place}: is a file where a folder belongs; remove it"
    assert (code, found["damaged"]) == (6, [{"found": message, "redo": "grpo run"}])
    (RUN / place).unlink()
    assert verify(grpo)[0] == 0
    assert grpo("run")[0] == 0


# ---- a run whose run.json is gone ----

REFUSED = (
    "error: artifacts/tiny/run.json: missing, though outputs of the run are there; with its pipeline.yaml,"
)
AGAIN = "`grpo run -c FILE --set run=tiny` writes it again"


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", "tiny"],
        ["status", "./artifacts/tiny"],
        ["verify"],
        ["show"],
        ["sql", "select 1"],
        ["sql", "select 1", "--run", "t*"],
        ["report"],
        ["compare", "tiny", "other"],
        ["fork", "tiny", "other"],
        ["export", "tiny", "--out", "x"],
        ["gc"],
        ["run", "tiny"],
        ["evaluate", "tiny"],
    ],
    ids=" ".join,
)
def test_a_run_without_its_run_json_is_damaged(finished: Path, grpo: Grpo, command: list[str]) -> None:
    (RUN / "run.json").unlink()
    assert grpo(*command) == (6, "", f"{REFUSED} {AGAIN}\n")


def test_run_writes_run_json_again_and_says_so(finished: Path, grpo: Grpo) -> None:
    before = (RUN / "run.json").read_bytes()
    (RUN / "run.json").unlink()
    code, _, err = grpo("run", "--set", "seed=5")
    assert (code, "fixed for the run tiny" in err) == (4, True)
    code, _, err = grpo("run", "--dry-run")
    assert (code, "2 of 2 iterations are complete" in err, (RUN / "run.json").exists()) == (0, True, False)
    code, _, err = grpo("run")
    said = "run tiny: run.json was gone; it is written again, with what is configured now"
    assert (code, said in err) == (0, True), err
    assert (RUN / "run.json").read_bytes() == before
    assert "was gone" not in grpo("run")[2]
    assert grpo("verify")[0] == 0


def test_what_is_elsewhere_is_restored_from_a_copy(finished: Path, grpo: Grpo) -> None:
    RUN.rename("elsewhere")
    Path("elsewhere/run.json").unlink()
    code, _, err = grpo("status", "elsewhere")
    assert (code, err.endswith("outputs of the run are there; restore it from a copy\n")) == (6, True), err
    for other in ("nothing", "model"):  # folders that are no runs
        Path(other).mkdir(exist_ok=True)
        assert grpo("status", other)[0] == 2
