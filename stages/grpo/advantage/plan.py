"""advantage, planned: what the advantages of an iteration depend on."""

from functools import cache
from pathlib import Path

import grpo
from grpo.artifacts import ActiveRun, Manifest, Plan, lacking
from grpo.artifacts.files import sha256_of
from grpo.config import AdvantageConfig
from grpo.config.named_files import named_file
from grpo.errors import InputError

NAME = "advantage"
OUTPUT = "advantages"
STAGE_VERSION = 2  # 2: sums of three rewards and more are compensated, which may change the last bit
_SHIPPED = (
    "advantage/advantage.sql",
    "advantage/batch_deviation.sql",
    "sql/macros.sql",
    "sql/views/scored.sql",
)


def plan(run: ActiveRun, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when an input is missing or partial."""
    config = run.config.advantage
    rollouts = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    rewards = run.require("rewards", iteration, f"grpo score --iteration {iteration}")
    for output, manifest in (("rewards", rewards), ("rollouts", rollouts)):
        if why := lacking(run, manifest):
            raise InputError(f"{run.folder(output, iteration)}: {why}; {_way_on(manifest)}")
    own_sql = config.where is not None or config.sql is not None
    weights: dict[str, float] = rewards.summary["weights"]
    # A reward of weight 0 counts only for a user's own SQL, which may look at it.
    names = [f"reward/{name}@{iteration}" for name in weights if own_sql or weights[name] != 0]
    references = [f"rollouts@{iteration}", *names, *(["prompts"] if own_sql else [])]
    user_files = shipped_sql(config)
    if config.sql is not None:
        user_files["advantage.sql"] = sha256_of(named_file(run.imports, "advantage.sql", config.sql))
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"advantage": config.recorded(), **({"unrewarded": True} if run.config.unrewarded else {})},
        inputs={reference: run.id_of(reference) or "" for reference in references},
        user_files=user_files,
    )


def shipped_sql(config: AdvantageConfig) -> dict[str, str]:
    """sha256 of the queries of this package that are used: the formula may be changed there too."""
    names = [*_SHIPPED, f"advantage/estimators/{config.estimator}.sql"]
    names += ["advantage/stale.sql"] if config.max_policy_lag is not None else []
    return {name: _sha256_of_own(name) for name in names}


@cache
def _sha256_of_own(name: str) -> str:
    return sha256_of(Path(grpo.__file__).parent / name)


def _way_on(manifest: Manifest) -> str:
    """What to do about an output that lacks something."""
    command = f"`grpo {manifest.stage} --iteration {manifest.iteration}`"
    if manifest.stage == "generate":
        return f"{command} samples another round, `generate.dynamic_sampling: null` continues with these"
    if manifest.summary["failed"]:
        return f"{command} tries them again, `score.on_error: drop` leaves them out"
    return f"{command} scores the others"
