"""execute: work that other processes do: they compute and answer, the driver alone commits."""

from grpo.execute.backends import backend_of, require_ray
from grpo.execute.checkpoint import Checkpoint
from grpo.execute.pool import Pool
from grpo.execute.processes import LocalProcesses
from grpo.execute.protocol import Backend, Worker, WorkerDied

__all__ = [
    "Backend",
    "Checkpoint",
    "LocalProcesses",
    "Pool",
    "Worker",
    "WorkerDied",
    "backend_of",
    "require_ray",
]
