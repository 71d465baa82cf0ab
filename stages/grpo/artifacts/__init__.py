"""artifacts: where things are, and how they are committed."""

from grpo.artifacts.manifest import FileRecord, Manifest, Plan, digest, id_of
from grpo.artifacts.run import ARTIFACTS, STAGE_OUTPUTS, Run, open_run
from grpo.artifacts.staging import Staging, discard, roll_forward, staged_attempts

__all__ = [
    "ARTIFACTS",
    "STAGE_OUTPUTS",
    "FileRecord",
    "Manifest",
    "Plan",
    "Run",
    "Staging",
    "digest",
    "discard",
    "id_of",
    "open_run",
    "roll_forward",
    "staged_attempts",
]
