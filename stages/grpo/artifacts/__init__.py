"""artifacts: where things are, and how they are committed."""

from grpo.artifacts import files
from grpo.artifacts.active import ActiveRun
from grpo.artifacts.best import Best, Stop, best_of, note_stop, read_stop, require_best, stop_at, stopped_path
from grpo.artifacts.checkpoint import checkpoint_files, checkpoint_id, is_hub_id, is_weight_file
from grpo.artifacts.existing import ARTIFACTS, created_config, open_run, require_run, run_names
from grpo.artifacts.layout import (
    EVALUATION,
    OUTPUTS,
    RUN_OUTPUTS,
    STAGE_OUTPUTS,
    TABLES_OF,
    holder_of,
    iterations_in,
    policy_of,
)
from grpo.artifacts.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    Plan,
    digest,
    id_of,
    read_json,
    read_manifest,
    read_sealed,
    seal,
)
from grpo.artifacts.partial import lacking, num_rounds, unscored_rounds
from grpo.artifacts.retention import droppable, is_kept, prune, prune_behind
from grpo.artifacts.run import PRUNED, TIMINGS, Run
from grpo.artifacts.space import require_space
from grpo.artifacts.staging import (
    Product,
    Staging,
    check_staged,
    choose_attempt,
    discard,
    roll_forward,
    staged_attempts,
    staging_folders,
    versions,
)

__all__ = [
    "ARTIFACTS",
    "EVALUATION",
    "MANIFEST",
    "OUTPUTS",
    "PRUNED",
    "RUN_OUTPUTS",
    "STAGE_OUTPUTS",
    "TABLES_OF",
    "TIMINGS",
    "ActiveRun",
    "Best",
    "FileRecord",
    "Manifest",
    "Plan",
    "Product",
    "Run",
    "Staging",
    "Stop",
    "best_of",
    "check_staged",
    "checkpoint_files",
    "checkpoint_id",
    "choose_attempt",
    "created_config",
    "digest",
    "discard",
    "droppable",
    "files",
    "holder_of",
    "id_of",
    "is_hub_id",
    "is_kept",
    "is_weight_file",
    "iterations_in",
    "lacking",
    "note_stop",
    "num_rounds",
    "open_run",
    "policy_of",
    "prune",
    "prune_behind",
    "read_json",
    "read_manifest",
    "read_sealed",
    "read_stop",
    "require_best",
    "require_run",
    "require_space",
    "roll_forward",
    "run_names",
    "seal",
    "staged_attempts",
    "staging_folders",
    "stop_at",
    "stopped_path",
    "unscored_rounds",
    "versions",
]
