"""examples/cluster/torchrun.sbatch: two nodes of a job are two torchruns here, of a process each."""

import json
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tests.faults import crash
from tests.pages import slurm

SCRIPT = Path(__file__).parents[2] / "examples" / "cluster" / "torchrun.sbatch"
SLOW = """
import time
def code(prompts, completions, **columns):
    time.sleep(0.3)
    return [float(len(text)) for text in completions]
"""


def job(environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {**environment, "MASTER_PORT": str(port)}
    return subprocess.Popen(["bash", SCRIPT], cwd=folder, env=given, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.xdist_group("parallel")
def test_a_job_is_told_put_back_and_resumes_to_the_same_bits(project: Path) -> None:
    Path("reward.py").write_text(SLOW)
    environment = slurm.environment(project / "bin")
    first = job(environment, project)
    until = time.monotonic() + 300
    while not (crash.RUN / "iteration=000000/rollouts/manifest.json").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # to the script alone, as B: has it
    _, err = first.communicate(timeout=300)
    assert first.returncode == 1, err
    assert "interrupted: what is committed is kept" in err
    assert Path("requeued").read_text() == "requeue 7\n"
    assert not Path(crash.RUN, "iteration=000001/update").exists()
    again = job(environment, project)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err + Path("torchrun-others.log").read_text()
    assert Path("requeued").read_text() == "requeue 7\n"  # not once more
    found = crash.contents(project)
    manifest = json.loads((crash.RUN / "iteration=000001/update/manifest.json").read_text())
    assert manifest["execution"]["processes"] == 2
    shutil.rmtree("artifacts")
    whole = job(environment, project)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert crash.contents(project) == found
