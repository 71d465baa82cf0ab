"""machine: what is needed of it beside memory and disk: a compiler where kernels are built, idle cores."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from grpo.artifacts import ActiveRun
from grpo.errors import ResourceError
from grpo.manage.doctor.report import Report
from grpo.models.device import busy, gpu_is_there


def check_compiler(run: ActiveRun, report: Report) -> None:
    """Whether Triton can build its kernels, where a GPU and Triton are there; nothing to say elsewhere."""
    if not torch.cuda.is_available():
        if gpu_is_there():
            with report.check("GPU", "the driver has one", "torch can use it") as check:
                check.warn("torch cannot: its CUDA is newer than the driver; update the driver")
        return
    if find_spec("triton") is None:
        return
    # As Triton looks for it (triton/runtime/build.py).
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    with report.check("compiler", compiler or "none", "a C compiler and Python.h, for Triton's kernels"):
        if compiler is None or shutil.which(compiler) is None:
            named = f"CC names {compiler}, which is not there" if compiler else "no gcc and no clang is there"
            raise ResourceError(f"compiler: {named}; Triton builds its kernels with one: install gcc")
        if not header.exists():
            raise ResourceError(f"compiler: {header}: missing; install Python's headers (python3-dev)")


def check_threads(report: Report) -> None:
    """Whether the threads of torch would wait on each other; nothing to say where not."""
    if how := busy():
        with report.check("threads", f"{torch.get_num_threads()}, {how}", "idle cores") as check:
            check.warn("OMP_NUM_THREADS=1 may be many times faster while others work here")
