"""signal: how many groups the rewards tell apart, which generate.dynamic_sampling goes by."""

from collections.abc import Collection
from typing import Any

from grpo import sql, tables
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Staging, num_rounds
from grpo.sql.scored import count_signal, create_scored


def signal_summary(
    run: ActiveRun, staging: Staging, rollouts: Manifest, held: list[FileRecord], weights: Collection[float]
) -> dict[str, Any]:
    """Of rewards that are about to be committed: groups with signal, and the rounds they are of.

    Empty where the rollouts were sampled without generate.dynamic_sampling: nobody asks.
    """
    if dynamic_sampling_of(rollouts) is None:
        return {}
    paths = [staging.folder / record.name for record in held if record.table == "rewards"]
    rewards = tables.decode("rewards", ((path, path.read_bytes()) for path in paths))
    with staging.clock("signal"), sql.connect([run], rollouts.iteration, ("rollouts",)) as connection:
        sql.register(connection, "_rewards_0", rewards)
        create_scored(connection, weights)
        found = count_signal(connection)
    return {"groups_with_signal": found, "rounds": num_rounds(rollouts)}


def say_short(run: ActiveRun, rollouts: Manifest, rewards: Manifest) -> None:
    """Say it where the last round has not brought enough groups with signal."""
    dynamic_sampling = dynamic_sampling_of(rollouts)
    if dynamic_sampling is None or num_rounds(rollouts) < dynamic_sampling["max_rounds"]:
        return
    found, wanted = rewards.summary["groups_with_signal"], dynamic_sampling["min_groups"]
    if found < wanted:
        run.console.say(
            f"score {rewards.iteration}: {found} of {wanted} groups with signal after {num_rounds(rollouts)}"
            " rounds (generate.dynamic_sampling.max_rounds); continuing with these"
        )


def dynamic_sampling_of(rollouts: Manifest) -> dict[str, int] | None:
    """generate.dynamic_sampling as the rollouts were planned with it."""
    found: dict[str, int] | None = rollouts.config.get("generate", {}).get("dynamic_sampling")
    return found
