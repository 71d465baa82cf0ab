"""A mirrored run comes back byte for byte, and what was damaged on the way is found."""

import json
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo, copy_to_work_in
from tests.mirror.s3 import Bucket, Server
from tests.mirror.test_mirroring import RUN, committed, mirrored, succeed, to

from grpo.artifacts import seal


def held_in(folder: Path) -> dict[str, bytes]:
    """All files of a run but for those that stay where it was made."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in (".lock", ".mirror.json")}


@pytest.fixture
def copied(finished: Path, grpo: Grpo, bucket: Bucket) -> str:
    """The address of a finished run in a mirror; the test runs in its project."""
    succeed(grpo, "run", *to(bucket))
    return f"s3://{bucket.name}/runs/tiny"


def test_it_comes_back_byte_for_byte_and_verifies(copied: str, grpo: Grpo) -> None:
    before = held_in(RUN)
    shutil.move(RUN, "away")
    err = succeed(grpo, "restore", copied)
    assert err.startswith("run tiny: 12 outputs, ")
    assert err.endswith("restored to artifacts/tiny; next: grpo verify artifacts/tiny\n")
    assert held_in(RUN) == before
    code, out, _ = grpo("verify", "--json")
    assert (code, json.loads(out)["damaged"], json.loads(out)["stale"]) == (0, [], [])
    assert not list(Path("artifacts").glob(".restore*"))


def test_it_goes_on_as_the_run_itself_would(copied: str, grpo: Grpo, bucket: Bucket) -> None:
    succeed(grpo, "run", "--set", "iterations=3")
    expected = {key for key in committed() if key.endswith(".parquet")}
    shutil.rmtree(RUN)
    succeed(grpo, "restore", copied)
    succeed(grpo, "run", *to(bucket, "--set", "iterations=3"))
    assert {key for key in committed() if key.endswith(".parquet")} == expected
    assert mirrored(bucket) == committed()


def test_elsewhere_under_another_name(copied: str, grpo: Grpo) -> None:
    before = held_in(RUN)
    succeed(grpo, "restore", copied, "--out", "copies/mine")
    assert held_in(Path("copies/mine")) == before
    succeed(grpo, "verify", "copies/mine")
    assert held_in(RUN) == before


def test_what_was_fetched_stays_where_it_is_cut_off(
    copied: str, grpo: Grpo, server: Server, bucket: Bucket
) -> None:
    before = held_in(RUN)
    shutil.rmtree(RUN)
    server.before = lambda method, key: 403 if "iteration=000001/advantages-" in key else None
    code, _, err = grpo("restore", copied)
    assert (code, err.count("\n"), "access denied" in err) == (7, 1, True), err
    assert not RUN.exists()
    server.reset()
    succeed(grpo, "restore", copied)
    got = {key for method, key in server.seen if method == "GET" and key.endswith(".parquet")}
    assert got
    assert all("iteration=000001/advantages-" in key or "iteration=000001/update-" in key for key in got)
    assert held_in(RUN) == before


def test_a_mirror_that_changed_between_two_tries(
    copied: str, grpo: Grpo, server: Server, bucket: Bucket
) -> None:
    shutil.copytree(RUN, "away")
    shutil.rmtree(RUN)
    server.before = lambda method, key: 403 if "iteration=000001/update-" in key else None
    assert grpo("restore", copied)[0] == 7
    server.reset()
    shutil.copytree("away", RUN)  # its owner goes on meanwhile
    succeed(grpo, "score", "--iteration", "1", "--force", *to(bucket))
    succeed(grpo, "gc", "--checkpoints", *to(bucket))
    expected = {name: content for name, content in held_in(RUN).items() if not name.startswith(".trash")}
    shutil.rmtree(RUN)
    succeed(grpo, "restore", copied)
    assert held_in(RUN) == expected


def test_a_flipped_byte_is_found_and_nothing_is_made_of_it(copied: str, grpo: Grpo, bucket: Bucket) -> None:
    shutil.rmtree(RUN)
    key = next(key for key in bucket.names() if "iteration=000001/rewards-" in key and "part" in key)
    content = bytearray(bucket.read(key))
    content[len(content) // 2] ^= 1
    bucket.write(key, bytes(content))
    code, _, err = grpo("restore", copied)
    expected = f"error: s3://{bucket.name}/{key}: content changed since it was committed (sha256 differs)\n"
    assert (code, err) == (6, expected)
    assert not RUN.exists()


def test_a_changed_manifest_is_found(copied: str, grpo: Grpo, bucket: Bucket) -> None:
    shutil.rmtree(RUN)
    key = "runs/tiny/iteration=000001/rewards/manifest.json"
    bucket.write(key, bucket.read(key).replace(b'"attempt": 0', b'"attempt": 1'))
    code, _, err = grpo("restore", copied)
    assert (code, err.startswith(f"error: s3://{bucket.name}/{key}: content changed since")) == (6, True), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("of", "change", "expected"),
    [
        (1, {"fingerprint": "/../../../../../evil"}, "fingerprint: expected 64 hexadecimal digits"),
        (0, {}, "is of score of iteration 0"),
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused(
    copied: str, grpo: Grpo, bucket: Bucket, of: int, change: dict[str, object], expected: str
) -> None:
    shutil.rmtree(RUN)
    key = "runs/tiny/iteration=000001/rewards/manifest.json"
    manifest = json.loads(bucket.read(key.replace("000001", f"00000{of}"))) | change
    del manifest["sha256"]
    bucket.write(key, seal(manifest))
    code, _, err = grpo("restore", copied)
    assert (code, err) == (6, f"error: s3://{bucket.name}/{key}: {expected}\n")
    assert not RUN.exists()
    code, _, err = grpo("sql", "--run", copied, "select 1 as one")
    assert (code, expected in err) == (6, True)


def test_a_run_that_is_there_gets_what_it_lacks_and_keeps_the_rest(copied: str, grpo: Grpo) -> None:
    before = held_in(RUN)
    assert succeed(grpo, "restore", copied).startswith("run tiny: 0 outputs, 0 files (0.0 MiB) restored")
    shutil.rmtree(RUN / "iteration=000001" / "rewards")
    assert succeed(grpo, "restore", copied).startswith("run tiny: 1 outputs, ")
    assert held_in(RUN) == before


def test_another_run_that_is_there_is_refused_and_left_alone(copied: str, grpo: Grpo) -> None:
    shutil.rmtree(RUN / "iteration=000000" / "advantages")
    succeed(grpo, "score", "--iteration", "1", "--force")
    before = held_in(RUN)
    code, _, err = grpo("restore", copied)
    assert (code, err) == (
        4,
        f"error: artifacts/tiny/iteration=000001/rewards/manifest.json: is not the one in {copied}; nothing"
        " was written; --out DIR restores it elsewhere\n",
    )
    assert held_in(RUN) == before


@pytest.mark.parametrize(
    ("address", "code", "expected"),
    [
        ("s3://{bucket}/runs/tyni", 2, "s3://{bucket}/runs/tyni: no such run; runs there: tiny"),
        ("s3://{bucket}", 2, "s3://{bucket}: a bucket; expected a run in it, s3://bucket/prefix/run"),
        ("tiny", 2, "tiny: expected s3://bucket or s3://bucket/prefix: a bucket of 3 to 63 small letters"),
        (
            "s3://no-such-bucket/tiny",
            2,
            "s3://no-such-bucket: no bucket no-such-bucket; make it first, or name",
        ),
    ],
)
def test_what_is_no_mirrored_run(
    copied: str, grpo: Grpo, bucket: Bucket, address: str, code: int, expected: str
) -> None:
    found, _, err = grpo("restore", address.format(bucket=bucket.name), "--out", "x")
    assert (found, err.startswith(f"error: {expected.format(bucket=bucket.name)}")) == (code, True), err


def test_names_that_lead_out_of_the_run_are_not_followed(copied: str, grpo: Grpo, bucket: Bucket) -> None:
    shutil.rmtree(RUN)
    text = b"text"
    for name in ("sources/" + "a" * 64 + "-..=2F..=2F..=2Fevil", "iteration=1/evil", "other/evil"):
        bucket.write(f"runs/tiny/{name}", text)
    succeed(grpo, "restore", copied)
    assert not list(Path("..").rglob("*evil*"))


def test_sql_reads_the_mirror(copied: str, grpo: Grpo, server: Server) -> None:
    query = "select iteration, count(*) as n, sum(value) as s from rewards group by all order by all"
    _, expected, _ = grpo("sql", query, "--json")
    shutil.rmtree(RUN)
    server.seen.clear()
    code, out, err = grpo("sql", "--run", copied, query, "--json")
    assert (code, out) == (0, expected), err
    got = [key for method, key in server.seen if method == "GET" and key.endswith(".parquet")]
    assert got
    assert all("/rewards-" in key or "/prompts-" in key for key in got)  # nothing else was fetched
    for view in ("samples", "iterations", "manifests", "timings", "rollouts", "updates", "logprobs"):
        code, out, err = grpo("sql", "--run", copied, f"select count(*) as n from {view}", "--json")
        assert code == 0, err
        assert json.loads(out)[0]["n"] > 0
    assert not list(Path("artifacts").glob("*"))


def test_sql_of_evaluations_and_of_two_runs(
    complete_and_measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grpo: Grpo,
    bucket: Bucket,
) -> None:
    copy_to_work_in(complete_and_measured, tmp_path, monkeypatch)
    succeed(grpo, "run", *to(bucket))
    names = ("--run", f"s3://{bucket.name}/runs/tiny", "--run", "tiny")
    query = "select run, iteration, pass_at[1] as p from evals order by all"
    code, out, err = grpo("sql", *names, query, "--json")
    assert code == 0, err
    rows = json.loads(out)
    half = len(rows) // 2
    assert half == 3
    assert [row["p"] for row in rows[:half]] == [row["p"] for row in rows[half:]]
