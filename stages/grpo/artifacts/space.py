"""artifacts.space: whether the disk has room for what is about to be written, before it is worked for."""

import shutil

from grpo.artifacts.active import ActiveRun
from grpo.errors import ResourceError

# An output is about as large as that of the iteration before; lengths of responses change.
_MARGIN = 1.25
_LEAST_BYTES = 2**20  # manifests, logs, a shard or two


def require_space(run: ActiveRun, output: str, iteration: int, num_bytes: int | None = None) -> None:
    """Raise ResourceError (exit 7) when there is less room than `output` of `iteration` will take.

    num_bytes: how much that is, where it is known; None: that of the iteration before tells.
    """
    if num_bytes is None:
        before = run.manifest(output, iteration - 1) if iteration > 0 else None
        num_bytes = sum(file.bytes for file in before.files) if before is not None else 0
    needed = int(_MARGIN * num_bytes) + _LEAST_BYTES
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise ResourceError(
            f"{run.folder(output, iteration)}: needs about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB"
            f" are free on its disk; free some (`grpo gc`), or keep fewer checkpoints (checkpoints.keep_last)"
        )
