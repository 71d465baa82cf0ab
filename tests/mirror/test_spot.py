"""examples/cluster/skypilot.yaml: what it runs, on a machine that is taken away and on the next one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.faults import crash
from tests.mirror.s3 import Bucket, Server
from tests.mirror.test_mirroring import committed, mirrored

TASK: dict[str, Any] = YAML(typ="safe").load(
    Path(__file__).parents[2] / "examples" / "cluster" / "skypilot.yaml"
)
# The command, for which the lease of a machine that is gone lapses after seconds.
GRPO = f"""\
#!/usr/bin/env bash
exec {sys.executable} -c '
from grpo.artifacts import lease; from grpo.cli import main
lease.LAPSE_S = 3
main()' "$@"
"""


def machine(files: Path, folder: Path, bucket: Bucket) -> subprocess.Popen[str]:
    """A new one, with the files of the project alone."""
    shutil.copytree(files, folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "grpo").write_text(GRPO)
    (folder / "bin" / "grpo").chmod(0o755)
    given = {"RUN": "spot", "MIRROR": f"s3://{bucket.name}/runs"}
    assert {name for name, value in TASK["envs"].items() if value is None} == set(given)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", TASK["run"]],
        cwd=folder,
        env={**os.environ, **given, "PATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_machine_that_is_taken_away_costs_what_it_had_not_copied(
    project: Path, bucket: Bucket, tmp_path: Path
) -> None:
    first = machine(project, tmp_path / "first", bucket)
    copied = "runs/spot/iteration=000000/update/manifest.json"
    until = time.monotonic() + 300
    while copied not in bucket.names():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    _, said = first.communicate()
    assert "no such run" in said  # of the restore, which did not keep it from its work
    shutil.rmtree(tmp_path / "first")
    held = bucket.content("runs/spot/iteration=000000/")

    second = machine(project, tmp_path / "second", bucket)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert re.search("[0-9]+ outputs, .* restored to artifacts/spot", said)
    assert "mirror: in use by pid" in said  # the lease of the machine that is gone
    run = tmp_path / "second" / "artifacts" / "spot"
    assert mirrored(bucket, "spot") == committed(run)
    for key in held:  # what was there is what is there
        if key.endswith("manifest.json"):
            assert bucket.read(key) == held[key], key
    subprocess.run([sys.executable, "-m", "grpo", "run", "--set", "run=spot"], check=True)
    assert crash.contents(project) == crash.contents(tmp_path / "second")


@pytest.mark.slow
def test_a_store_that_refuses_ends_the_job_before_anything_is_sampled(
    project: Path, bucket: Bucket, server: Server, tmp_path: Path
) -> None:
    server.before = lambda method, key: 403
    task = machine(project, tmp_path / "first", bucket)
    _, said = task.communicate(timeout=300)
    assert task.returncode == 7, said
    assert not (tmp_path / "first" / "artifacts").exists()
