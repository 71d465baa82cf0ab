"""What is committed is in the mirror when the command ends, whatever came between."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.mirror.s3 import Bucket, Server

from grpo.artifacts import FileRecord
from grpo.errors import CorruptError
from grpo.mirror import store, upload

RUN = Path("artifacts/tiny")


def to(bucket: Bucket, *more: str) -> list[str]:
    """Options of a command that mirrors."""
    return ["--set", f"artifacts.mirror=s3://{bucket.name}/runs", *more]


def committed(run: Path = RUN) -> dict[str, bytes]:
    """What a mirror of the run has to hold: key -> content."""
    found = {}
    for path in run.rglob("manifest.json"):
        place = path.parent.relative_to(run)
        if place.parts[0] in (".trash", ".staging"):
            continue
        manifest = json.loads(path.read_bytes())
        found[f"{place}/manifest.json"] = path.read_bytes()
        folder = f"{place}-{manifest['fingerprint'][:16]}"
        files = [str(Path(file["part"], file["name"])) for file in manifest["files"]]
        found |= {f"{folder}/{name}": (path.parent / name).read_bytes() for name in [*files, "timings.json"]}
    found |= {str(path.relative_to(run)): path.read_bytes() for path in run.glob("sources/*")}
    return found | {"run.json": (run / "run.json").read_bytes()}


def mirrored(bucket: Bucket, name: str = "tiny") -> dict[str, bytes]:
    """What it holds but for the lease."""
    prefix = f"runs/{name}/"
    held = {key.removeprefix(prefix): content for key, content in bucket.content(prefix).items()}
    assert json.loads(held.pop("lease.json"))["released"]
    return held


def succeed(grpo: Grpo, *arguments: str) -> str:
    code, _, err = grpo(*arguments)
    assert code == 0, err
    return err


def test_a_run_is_in_the_mirror_byte_for_byte(project: Path, grpo: Grpo, bucket: Bucket) -> None:
    succeed(grpo, "run", *to(bucket))
    held = mirrored(bucket)
    assert held == committed()
    assert (
        sum(key.endswith("/manifest.json") for key in held) == 2 + 2 * 5
    )  # two of the run, five an iteration
    before = bucket.content()
    succeed(grpo, "run", *to(bucket))
    after = bucket.content()
    assert {key for key in after if after[key] != before[key]} == {"runs/tiny/lease.json"}


def test_the_manifest_comes_last_and_nothing_is_written_over(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server
) -> None:
    succeed(grpo, "run", *to(bucket))
    put = [key for method, key in server.seen if method == "PUT" and "iteration=000001/" in key]
    assert len(put) == len(set(put))
    for key in [key for key in put if key.endswith("/manifest.json")]:
        files = [other for other in put if other.startswith(f"{key.removesuffix('/manifest.json')}-")]
        assert files
        assert max(map(put.index, files)) < put.index(key)


def test_what_was_made_without_a_mirror_is_copied_by_the_next_command(
    finished: Path, grpo: Grpo, bucket: Bucket
) -> None:
    succeed(grpo, "run", *to(bucket))
    assert mirrored(bucket) == committed()


def test_a_replaced_output_replaces_the_copy_and_its_files(
    finished: Path, grpo: Grpo, bucket: Bucket
) -> None:
    succeed(grpo, "run", *to(bucket))
    before = {key for key in mirrored(bucket) if "/rewards" in key}
    succeed(grpo, "score", "--iteration", "1", "--force", *to(bucket))
    held = mirrored(bucket)
    assert held == committed()
    changed = before - held.keys()
    assert changed
    assert all(key.startswith("iteration=000001/rewards-") for key in changed)


def test_checkpoints_that_are_dropped_and_iterations_that_went_leave_the_mirror(
    finished: Path, grpo: Grpo, bucket: Bucket
) -> None:
    succeed(grpo, "run", *to(bucket))
    assert "iteration=000000/checkpoint/manifest.json" in mirrored(bucket)
    succeed(grpo, "gc", "--checkpoints", *to(bucket))
    held = mirrored(bucket)
    assert held == committed()
    assert not [key for key in held if key.startswith("iteration=000000/checkpoint")]
    succeed(grpo, "run", "--from", "0", "--yes", "--until", "1", *to(bucket, "--set", "seed=0"))
    assert mirrored(bucket) == committed()
    assert not [key for key in mirrored(bucket) if key.startswith("iteration=000001/")]


def test_what_was_lost_here_stays_there(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    succeed(grpo, "run", *to(bucket))
    before = mirrored(bucket)
    shutil.rmtree(RUN / "iteration=000001" / "rewards")
    succeed(grpo, "gc", *to(bucket))
    assert mirrored(bucket) == before


def test_another_run_of_the_name_is_refused_and_left_alone(
    finished: Path, grpo: Grpo, bucket: Bucket
) -> None:
    succeed(grpo, "run", *to(bucket))
    before = mirrored(bucket)
    (RUN / ".mirror.json").unlink()  # a folder that never wrote there
    succeed(grpo, "score", "--iteration", "1", "--force")
    lease = json.loads(bucket.read("runs/tiny/lease.json"))
    for _ in range(3):  # that it has tried makes it no owner
        code, _, err = grpo("run", *to(bucket))
        assert code == 4
        assert err == (
            f"error: s3://{bucket.name}/runs/tiny: holds other rewards of iteration 1 than this run, written"
            f" from elsewhere; `grpo restore s3://{bucket.name}/runs/tiny --out DIR` fetches that, another"
            " `artifacts.mirror` or `run:` keeps this one\n"
        )
        assert mirrored(bucket) == before
        assert json.loads(bucket.read("runs/tiny/lease.json"))["epoch"] == lease["epoch"]  # as ever


@pytest.mark.parametrize("address", ["gs://bucket/runs", "s3://", "s3://B/x", "s3://bucket//x", "bucket"])
def test_an_address_that_is_none_is_exit_2(project: Path, grpo: Grpo, address: str) -> None:
    code, _, err = grpo("run", "--set", f"artifacts.mirror={address}")
    expected = (
        "expected s3://bucket or s3://bucket/prefix: a bucket of 3 to 63 small letters, digits, . -;"
        " a prefix of letters, digits, . _ = -"
    )
    assert (code, err) == (2, f'error: --set artifacts.mirror: {expected}, found "{address}"\n')


def test_a_source_that_is_being_written_is_not_copied(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    (whole,) = (RUN / "sources").glob("*")
    digest = sha256(b"def code(): ...").hexdigest()
    (RUN / "sources" / f"{digest}-reward.py.tmp").write_bytes(b"def code(): ...")
    (RUN / "sources" / f"{'a' * 64}-other.py").write_text("of another content than its name says")
    succeed(grpo, "run", *to(bucket))
    assert [key for key in mirrored(bucket) if key.startswith("sources/")] == [f"sources/{whole.name}"]


def test_a_store_whose_etags_are_no_digests(
    project: Path, grpo: Grpo, bucket: Bucket, server: Server
) -> None:
    server.encrypts = True
    succeed(grpo, "run", "--until", "1", *to(bucket))
    assert mirrored(bucket) == committed()
    server.seen.clear()
    (RUN / ".mirror.json").unlink()  # all is compared, by what is there
    succeed(grpo, "run", "--until", "1", *to(bucket))
    put = {key for method, key in server.seen if method == "PUT"}
    assert put == {"runs/tiny/lease.json", "runs/tiny/run.json"}
    succeed(grpo, "run", *to(bucket))
    succeed(grpo, "score", "--iteration", "1", "--force", *to(bucket))
    assert mirrored(bucket) == committed()


def test_runs_whose_names_begin_alike_do_not_meet(finished: Path, grpo: Grpo, bucket: Bucket) -> None:
    shutil.copytree(RUN, RUN.with_name("tiny2"))
    for name in ("tiny2", "tiny"):
        succeed(grpo, "run", name, *to(bucket))
        assert mirrored(bucket, name) == committed(RUN.with_name(name))
    succeed(grpo, "gc", "tiny", "--checkpoints", *to(bucket))
    for name in ("tiny2", "tiny"):
        assert mirrored(bucket, name) == committed(RUN.with_name(name))


def test_large_files_go_in_pieces(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PIECE_BYTES", 5000)
    monkeypatch.setattr(upload, "_PIECE_BYTES", 3000)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 5000)
    succeed(grpo, "run", *to(bucket))
    assert mirrored(bucket) == committed()
    assert any(method == "POST" and key.endswith(".safetensors") for method, key in server.seen)
    shutil.move(RUN, "away")
    succeed(grpo, "restore", f"s3://{bucket.name}/runs/tiny")
    succeed(grpo, "verify", "--mirror", *to(bucket))
    assert committed() == committed(Path("away"))


def test_no_link_is_followed(finished: Path, grpo: Grpo, bucket: Bucket, server: Server) -> None:
    Path("secret").write_text("secret")
    timings = RUN / "iteration=000001" / "rewards" / "timings.json"
    timings.unlink()
    timings.symlink_to(Path("secret").absolute())
    code, _, err = grpo("run", *to(bucket))
    assert (code, f"{timings}: is a link to another file" in err) == (6, True), err
    assert server.seen == []


def test_a_file_here_that_cannot_be_read_is_named() -> None:
    """Its first page is mapped nowhere, so that reading it fails as on a disk that does."""
    path = Path("/proc/self/mem")
    record = FileRecord(name="mem", part="", bytes=1, sha256="0" * 64)
    with pytest.raises(CorruptError, match=r"^/proc/self/mem: cannot be read: Input/output error$"):
        [*upload.checked(record, path)]
