"""backends: which place for workers is configured."""

from importlib import import_module
from typing import Any

from grpo.config import ExecutionConfig
from grpo.errors import UsageError
from grpo.execute.answering import Open
from grpo.execute.processes import LocalProcesses
from grpo.execute.protocol import Backend


def backend_of(
    config: ExecutionConfig, open_worker: Open, cpus: int, gpus: int, grace_s: float = 0.0, together: int = 0
) -> Backend:
    """The one of `config`, for workers that take so much. Raises UsageError (exit 2) without Ray.

    grace_s: as of LocalProcesses; Ray has none. together: as of RayActors; here there is a place for any.
    """
    if config.backend == "local":
        return LocalProcesses(open_worker, grace_s)
    actors: Backend = require_ray().RayActors(open_worker, config.address, cpus, gpus, together)
    return actors


def require_ray() -> Any:
    """The module that knows Ray. Raises UsageError (exit 2) where Ray is not installed."""
    try:
        return import_module("grpo.execute.ray_actors")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(
            f"execution.backend: ray: {error}; `pip install 'grpo-stages[ray]'` brings it, on every node"
        ) from error
