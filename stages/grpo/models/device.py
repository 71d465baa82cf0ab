"""device: whether a GPU is there, how busy the machine is, main memory. Asked for every plan: no torch."""

import ctypes
import os
import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@cache
def gpu_is_there() -> bool:
    """Whether this process may use a GPU, asked of the driver: torch would take seconds to say the same.

    False too where torch was built without support for one.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    if Path("/dev/kfd").exists():  # AMD's compute driver
        return _torch_uses("hip")
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    count = ctypes.c_uint(0)
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return not failed and count.value > 0 and _torch_uses("cuda")


def _torch_uses(platform: str) -> bool:
    """Whether torch was built for it, from the file in which it says so."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return bool(runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get(platform))


def busy() -> str:
    """How busy the processor is, where torch's threads would wait on each other; else nothing.

    With more to do than there are cores they do: 30 times slower was seen.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores or "OMP_NUM_THREADS" in os.environ or gpu_is_there():
        return ""
    return f"load {load:.0f} on {cores} cores"


def main_memory() -> tuple[int, int]:
    """Bytes of main memory: what there is for this process, and what of it nobody holds."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):  # with caches, which the kernel gives up
            free = 1024 * int(line.split()[1])
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.stat"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        total = min(total, int(most))
        kinds = dict(line.split() for line in used.read_text().splitlines()) if used.exists() else {}
        free = min(free, total - int(kinds.get("anon", 0)))
    return total, min(free, total)
