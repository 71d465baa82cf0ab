import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from grpo.generate.engines import choice as engine_choice
from grpo.generate.engines.choice import choose_engine
from grpo.models.device import gpu_is_there


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """The answer of the driver is kept for a process; here every test asks again."""
    for asked in (gpu_is_there, choose_engine):
        asked.cache_clear()
    yield
    for asked in (gpu_is_there, choose_engine):
        asked.cache_clear()


@pytest.mark.parametrize(
    ("vllm", "gpu", "choice"),
    [
        (False, False, ("transformers", "auto: vllm is not installed")),
        (False, True, ("transformers", "auto: vllm is not installed")),
        (True, False, ("transformers", "auto: no GPU is there; engine: vllm works on a CPU too")),
        (True, True, ("vllm", "auto: vllm is installed and a GPU is there")),
    ],
)
def test_auto_wants_vllm_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, vllm: bool, gpu: bool, choice: tuple[str, str]
) -> None:
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: spec if name == "vllm" and vllm else None)
    monkeypatch.setattr(engine_choice, "gpu_is_there", lambda: gpu)
    assert choose_engine("auto") == choice
    assert choose_engine("transformers") == ("transformers", "as configured")
    assert choose_engine("vllm") == ("vllm", "as configured")  # what is missing is the engine's own error


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
@pytest.mark.parametrize("value", ["", " ", "-1"])
def test_no_visible_device_means_no_gpu(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert not gpu_is_there()


def test_the_driver_says_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert gpu_is_there() == torch.cuda.is_available()


def test_choosing_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from grpo.generate.engines.choice import choose_engine, gpu_is_there;"
        " choose_engine('auto'); gpu_is_there();"
        " print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"
