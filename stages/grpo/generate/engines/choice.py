"""choice: which engine samples, and why. Asked for every plan: imports neither torch nor vllm."""

from functools import cache
from importlib.util import find_spec

from grpo.models.device import gpu_is_there


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
