"""generate, planned: what the rollouts of an iteration depend on, and how they are cut into shards."""

from typing import Any

from grpo.artifacts import ActiveRun, Plan, Run, policy_of
from grpo.artifacts.files import sha256_of
from grpo.config import GenerateConfig
from grpo.config.named_files import named_file
from grpo.generate.engines.choice import choose_engine, default_dtype

NAME = "generate"
OUTPUT = "rollouts"
STAGE_VERSION = 3  # 3: the built-in engine adds up attention otherwise, which may change bits
KEY = "generate.prompts_sql"


def plan(run: ActiveRun, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when prompts or policy are missing."""
    config = run.config.generate
    run.require("prompts", None, "grpo run")
    policy = policy_of(iteration, config.policy_lag)
    if policy > 0:
        run.require("update", policy - 1, f"grpo update --iteration {policy - 1}")
    references, user_files = ["prompts", f"policy@{policy}"], {}
    if config.prompts_sql is not None:
        references += past_tables(run, past_of(config, iteration))
        user_files[KEY] = sha256_of(named_file(run.imports, KEY, config.prompts_sql))
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"seed": run.config.seed, "generate": described(config), **run.config.loaded_with()},
        inputs={reference: run.id_of(reference) or "" for reference in references},
        user_files=user_files,
        shards=shards_of(config.prompts_per_iteration, config.samples_per_prompt, config.rollouts_per_shard),
    )


def described(config: GenerateConfig) -> dict[str, Any]:
    """Every key of the section, with the engine that is taken and what it computes in."""
    values = {**config.recorded(), "engine": choose_engine(config.engine)[0]}
    if values["engine"] == "vllm":
        values["engine_options"] = {"dtype": default_dtype(), **config.engine_options}
    return values


def past_of(config: GenerateConfig, iteration: int) -> range:
    """The iterations whose tables are there when `iteration` is sampled, whatever runs beside it."""
    return range(policy_of(iteration, config.policy_lag))


def past_tables(run: Run, iterations: range) -> list[str]:
    """What the query may read, as references: the tables of these iterations."""
    references = []
    for number in iterations:
        run.require("rollouts", number, f"grpo generate --iteration {number}")
        rewards = run.require("rewards", number, f"grpo score --iteration {number}")
        run.require("advantages", number, f"grpo advantage --iteration {number}")
        names = ("rollouts", *(f"reward/{name}" for name in rewards.summary["weights"]), "advantages")
        references += [f"{name}@{number}" for name in names]
    return references


def shards_of(num_groups: int, samples: int, rollouts_per_shard: int) -> list[list[int]]:
    """[first group, one past the last] of each shard: whole groups, rollouts_per_shard at most."""
    size = max(1, rollouts_per_shard // samples)
    return [[start, min(start + size, num_groups)] for start in range(0, num_groups, size)]
