"""`grpo verify --mirror` and `grpo doctor`: what is wrong with a mirror, before it is needed."""

import json
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.mirror.s3 import Bucket, Server
from tests.mirror.test_mirroring import RUN, committed, mirrored, succeed, to

from grpo.manage.doctor import copies


def flip(bucket: Bucket, key: str) -> None:
    content = bytearray(bucket.read(key))
    content[len(content) // 2] ^= 1
    bucket.write(key, bytes(content))


def test_a_whole_mirror_is_read_and_counted(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    succeed(grpo, "run", *to(bucket))
    code, out, _ = grpo("verify", "--mirror", *to(bucket, "--json"))
    report = json.loads(out)["mirror"]
    assert (code, report["damaged"], report["behind"], report["beyond"]) == (0, [], [], [])
    assert report["files"] == json.loads(out)["files"] - len(list(RUN.glob("sources/*")))
    code, out, _ = grpo("verify", "--mirror", *to(bucket))
    last = out.splitlines()[-1]
    assert last.startswith(f"mirror s3://{bucket.name}/runs/tiny: {report['files']} files (")
    assert last.endswith(" read; 0 damaged, 0 behind")


def test_a_flipped_byte_is_found_and_copied_again(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    succeed(grpo, "run", *to(bucket))
    key = next(
        key for key in bucket.names() if "iteration=000001/rewards-" in key and key.endswith(".parquet")
    )
    flip(bucket, key)
    code, out, _ = grpo("verify", "--mirror", *to(bucket))
    assert code == 6
    assert f"damaged  s3://{bucket.name}/{key}: content changed since it was committed" in out
    assert (
        "damaged copies of outputs that are whole here: `grpo verify --mirror --discard` replaces them" in out
    )
    succeed(grpo, "run", *to(bucket))  # which trusts the manifest
    code, out, _ = grpo("verify", "--mirror", "--discard", *to(bucket))
    assert (code, out.splitlines()[-1]) == (6, "damaged copies of outputs that are whole here: replaced")
    assert mirrored(bucket) == committed()
    succeed(grpo, "verify", "--mirror", *to(bucket))


@pytest.mark.parametrize("what", ["manifest", "file", "source"])
def test_what_else_can_be_wrong(finished: Path, grpo: Grpo, bucket: Bucket, what: str) -> None:
    succeed(grpo, "run", *to(bucket))
    names = bucket.names()
    if what == "manifest":
        key = "runs/tiny/iteration=000001/rewards/manifest.json"
        flip(bucket, key)
    elif what == "file":
        key = next(key for key in names if "iteration=000001/advantages-" in key and "part-" in key)
        bucket.remove(key)
    else:
        key = next(key for key in names if "/sources/" in key)
        flip(bucket, key)
    code, out, _ = grpo("verify", "--mirror", *to(bucket, "--json"))
    (found,) = json.loads(out)["mirror"]["damaged"]
    assert (code, found.startswith(f"s3://{bucket.name}/{key}: ")) == (6, True), found
    if what != "source":
        grpo("verify", "--mirror", "--discard", *to(bucket))
        assert mirrored(bucket) == committed()


def test_what_is_behind_and_beyond_is_said(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    succeed(grpo, "run", *to(bucket))
    succeed(grpo, "score", "--iteration", "0", "--force")
    shutil.rmtree(RUN / "iteration=000001" / "update")
    _, out, _ = grpo("verify", "--mirror", *to(bucket, "--json"))
    report = json.loads(out)["mirror"]
    assert (report["behind"], report["beyond"]) == (["rewards of iteration 0"], ["update of iteration 1"])


def test_without_a_mirror_there_is_nothing_to_read(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    code, _, err = grpo("verify", "--mirror")
    expected = "error: verify --mirror: artifacts.mirror is null; set it to the mirror's address\n"
    assert (code, err) == (2, expected)


def doctor(grpo: Grpo, *arguments: str) -> tuple[int, dict[str, str]]:
    code, out, _ = grpo("doctor", "--json", *arguments)
    (check,) = [check for check in json.loads(out)["checks"] if check["name"] == "mirror"]
    return code, check


def test_doctor_tries_the_mirror_and_leaves_nothing(project: Path, grpo: Grpo, bucket: Bucket) -> None:
    code, check = doctor(grpo, *to(bucket))
    assert (code, check["level"], check["found"]) == (0, "ok", f"s3://{bucket.name}/runs")
    assert bucket.names() == []
    assert '"mirror"' not in grpo("doctor", "--json")[1]  # without one there is no check


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_doctor_refuses_a_store_without_conditions(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server, header: str
) -> None:
    server.ignores = {header}
    code, check = doctor(grpo, *to(bucket))
    assert (code, check["level"]) == (2, "failed")
    assert f"the store ignores {header}, so two commands could write one mirror" in check["note"]
    assert bucket.names() == []


def test_doctor_of_an_unreachable_store_is_exit_7(
    project: Path, grpo: Grpo, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(copies, "_PATIENCE_S", 0.3)
    code, check = doctor(grpo, *to(bucket))
    assert (code, "\n" in check["note"]) == (7, False)
    assert "the store does not answer as it should" in check["note"]


def test_doctor_without_credentials_asks_nobody(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    code, check = doctor(grpo, *to(bucket))
    assert (code, "no credentials; set AWS_ACCESS_KEY_ID" in check["note"]) == (2, True)
    assert server.seen == []


def test_dry_run_fails_as_the_run_would(project: Path, grpo: Grpo, bucket: Bucket) -> None:
    code, _, err = grpo("run", "--dry-run", "--set", "artifacts.mirror=s3://no-such-bucket/runs")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: s3://no-such-bucket/runs: no bucket no-such-bucket; make it first, or name another",
    )
