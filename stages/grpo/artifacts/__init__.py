"""artifacts: where things are, and how they are committed."""

from grpo.artifacts import files
from grpo.artifacts.checkpoint import checkpoint_files, checkpoint_id, is_hub_id, is_weight_file
from grpo.artifacts.manifest import FileRecord, Manifest, Plan, digest, id_of, seal
from grpo.artifacts.retention import prunable, prune, pruned_files
from grpo.artifacts.run import (
    ARTIFACTS,
    STAGE_OUTPUTS,
    Run,
    created_config,
    holder_of,
    iterations_in,
    open_run,
    read_json,
    require_run,
)
from grpo.artifacts.space import require_space
from grpo.artifacts.staging import Staging, choose_attempt, discard, roll_forward, staged_attempts, versions

__all__ = [
    "ARTIFACTS",
    "STAGE_OUTPUTS",
    "FileRecord",
    "Manifest",
    "Plan",
    "Run",
    "Staging",
    "checkpoint_files",
    "checkpoint_id",
    "choose_attempt",
    "created_config",
    "digest",
    "discard",
    "files",
    "holder_of",
    "id_of",
    "is_hub_id",
    "is_weight_file",
    "iterations_in",
    "open_run",
    "prunable",
    "prune",
    "pruned_files",
    "read_json",
    "require_run",
    "require_space",
    "roll_forward",
    "seal",
    "staged_attempts",
    "versions",
]
