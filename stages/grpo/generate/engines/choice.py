"""choice: which engine samples, and why. Asked for every plan: imports neither torch nor vllm."""

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def choose_engine(wanted: str) -> tuple[str, str]:
    """The engine to use and, in a few words, why."""
    if wanted != "auto":
        return wanted, "as configured"
    if find_spec("vllm") is None:
        return "transformers", "auto: vllm is not installed"
    if not gpu_is_there():
        return "transformers", "auto: no GPU is there; engine: vllm works on a CPU too"
    return "vllm", "auto: vllm is installed and a GPU is there"


def default_dtype() -> str:
    """What vLLM computes in unless told: the learner's own type where nothing is gained by a shorter one."""
    return "bfloat16" if gpu_is_there() else "float32"


@cache
def gpu_is_there() -> bool:
    """Whether this process may use a GPU, asked of the driver: torch would take seconds to say the same."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    if Path("/dev/kfd").exists():  # AMD's compute driver
        return True
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    count = ctypes.c_uint(0)
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return not failed and count.value > 0
