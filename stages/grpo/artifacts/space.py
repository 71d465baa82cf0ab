"""artifacts.space: whether the disk has room for what a stage is about to write, before it works for it."""

import shutil

from grpo.artifacts.active import ActiveRun
from grpo.errors import ResourceError

# An output is about as large as that of the iteration before; lengths of responses change.
_MARGIN = 1.25
_LEAST_BYTES = 2**20  # manifests, logs, a shard or two
_CHECKPOINT_FACTOR = 3  # float32 weights and two moments, against the starting policy's weights in float32


def require_space(run: ActiveRun, output: str, iteration: int) -> None:
    """Raise ResourceError (exit 7) when there is less room than `output` of `iteration` will take.

    That of the iteration before tells how much; of the first update, the starting policy's files do.
    """
    needed = int(_MARGIN * _expected(run, output, iteration)) + _LEAST_BYTES
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise ResourceError(
            f"{run.folder(output, iteration)}: needs about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB"
            f" are free on its disk; free some (`grpo gc`), or keep fewer checkpoints (checkpoints.keep_last)"
        )


def _expected(run: ActiveRun, output: str, iteration: int) -> int:
    before = run.manifest(output, iteration - 1) if iteration > 0 else None
    if before is not None:
        return sum(file.bytes for file in before.files)
    if output == "update" and "policy" in run.start:
        weights = sum(path.stat().st_size for path in run.start["policy"].glob("*.safetensors"))
        return _CHECKPOINT_FACTOR * weights
    return 0
