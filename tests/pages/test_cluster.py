"""examples/cluster, as far as one machine can run it: two nodes of Slurm are two Ray nodes here."""

import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.conftest import Grpo
from tests.faults import crash
from tests.pages import slurm as slurm_job

pytest.importorskip("ray")

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"


@pytest.fixture
def slurm(project: Path) -> dict[str, str]:
    """An environment as a job of two nodes has it."""
    return {**slurm_job.environment(project / "bin"), "RAY_PORT": "46379"}


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_slurm_job_is_told_put_back_and_goes_on(slurm: dict[str, str], project: Path, grpo: Grpo) -> None:
    job = subprocess.Popen(["bash", CLUSTER / "slurm.sbatch"], cwd=project, env=slurm, stderr=subprocess.PIPE)
    rollouts = project / crash.RUN / "iteration=000000/rollouts/manifest.json"
    until = time.monotonic() + 120
    while not rollouts.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)  # to the script alone, as B: has it
    _, err = job.communicate(timeout=120)
    assert job.returncode == 143, err
    assert (project / "requeued").read_text() == "requeue 7\n"
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch"], cwd=project, env=slurm, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(project.glob(".ray-token*"))
    found = crash.contents(project)
    shutil.rmtree(project / "artifacts")
    subprocess.run([sys.executable, "-m", "grpo", "run"], cwd=project, env=slurm, check=True)
    assert crash.contents(project) == found


def test_what_kuberay_runs_is_a_command_of_ours(project: Path, grpo: Grpo) -> None:
    job: dict[str, Any] = YAML(typ="safe").load(CLUSTER / "rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    found = re.search(r'--set "(execution=.*)"', job["spec"]["entrypoint"])
    assert found is not None
    code, out, err = grpo("run", "--dry-run", "--set", found[1])
    assert code == 0, err
    [group] = cluster["workerGroupSpecs"]
    counts = re.findall(r"execution\.(?:engines\.count|learner\.processes) +([0-9]+)\n", out)
    assert sum(map(int, counts)) - 1 == group["replicas"]  # the driver is a process of the learner
    assert cluster["rayVersion"] == metadata.version("ray")
