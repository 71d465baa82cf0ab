"""The network is gone from the n-th write on: no manifest counts what is not there, and nothing is lost."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.faults.tally import LONG, TURN
from tests.mirror.s3 import Bucket, Server
from tests.mirror.test_mirroring import committed, mirrored, succeed, to

STEP = 1 if LONG else 12  # every so many writes, and others every day
COMMANDS: dict[str, list[list[str]]] = {
    "first copy": [["run"]],
    "replaced": [["run"], ["score", "--iteration", "1", "--force"]],
    "removed": [["run"], ["gc", "--checkpoints"]],
    "moved away": [["run"], ["run", "--from", "0", "--yes", "--until", "1"]],
    "rerun": [["run"], ["run", "--from", "1", "--yes", "--set", "generate.temperature=0.9"]],
}


def check(bucket: Bucket) -> None:
    """Each manifest that is there counts files that are there, as they were committed."""
    for key in bucket.names():
        if key.endswith("/manifest.json"):
            manifest, base = json.loads(bucket.read(key)), key.removesuffix("/manifest.json")
            for file in manifest["files"]:
                place = str(Path(f"{base}-{manifest['fingerprint'][:16]}", file["part"], file["name"]))
                assert sha256(bucket.read(place)).hexdigest() == file["sha256"], place


def cut(server: Server, at: int) -> list[str]:
    """Have all requests fail from write `at` on; the writes that are asked for."""
    asked: list[str] = []

    def look(method: str, key: str) -> int | None:
        asked.extend([key] * (method in ("PUT", "POST", "DELETE")))
        return 403 if len(asked) > at else None

    server.before = look
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_cut_off_is_whole_and_completed(
    finished: Path, grpo: Grpo, bucket: Bucket, server: Server, name: str
) -> None:
    *before, command = COMMANDS[name]
    for each in before:
        succeed(grpo, *each, *to(bucket))
    shutil.copytree("artifacts", "start")
    start = bucket.content()
    asked = cut(server, 10**6)
    succeed(grpo, *command, *to(bucket))
    num_writes = len(asked)
    assert num_writes >= 4
    for at in range(TURN % min(STEP, num_writes), num_writes, STEP):
        server.reset()
        shutil.rmtree("artifacts")
        shutil.copytree("start", "artifacts")
        for key in bucket.names():
            bucket.remove(key)
        for key, content in start.items():
            bucket.write(key, content)
        cut(server, at)
        code, _, err = grpo(*command, *to(bucket))
        # The last write says that the lease is free; without it, it lapses.
        assert code == (7 if at < num_writes - 1 else 0), (at, err)
        check(bucket)
        server.reset()
        succeed(grpo, "run", "--until", "1" if name == "moved away" else "2", *to(bucket))
        assert mirrored(bucket) == committed(), at
