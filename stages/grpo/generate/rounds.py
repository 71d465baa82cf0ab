"""rounds: how many rounds of prompts an attempt holds, how they are cut, and what of them is there already.

generate.dynamic_sampling asks for further rounds where too few groups have signal. Each is a new attempt
at the same plan: it keeps the shards of the rounds before by hard links, and samples its own.
"""

from collections.abc import Sequence

from grpo.artifacts import ActiveRun, Manifest, Plan, Staging, lacking, num_rounds
from grpo.config import GenerateConfig
from grpo.errors import DataError
from grpo.generate.plan import shards_of_round


def rounds_to_hold(run: ActiveRun, plan: Plan, before: Manifest | None) -> int:
    """Rounds that the output holds once this attempt is done; before: what is committed now."""
    dynamic_sampling = run.config.generate.dynamic_sampling
    if dynamic_sampling is None:
        return 1
    if before is None:
        # Where rollouts were lost, the rewards that were made from them say how many rounds they had.
        rewards = run.manifest("rewards", plan.iteration)
        had = int(rewards.summary.get("rounds", 1)) if rewards else 1
        return min(had, dynamic_sampling.max_rounds)
    if not plan.same_as(before):
        return 1
    return num_rounds(before) + bool(another_round(run, plan, before))


def another_round(run: ActiveRun, plan: Plan, before: Manifest | None) -> str:
    """Why this attempt adds a round to what is committed; empty: it does not."""
    return lacking(run, before) if before is not None and plan.same_as(before) else ""


def all_shards(config: GenerateConfig, rounds: int) -> list[range]:
    """The groups of each shard; round r has the groups from r * prompts_per_iteration on."""
    offsets = range(0, rounds * config.prompts_per_iteration, config.prompts_per_iteration)
    return [
        range(offset + first, offset + end) for offset in offsets for first, end in shards_of_round(config)
    ]


def keep_rounds(run: ActiveRun, staging: Staging, before: Manifest | None, names: Sequence[str]) -> None:
    """Commit the rounds of `before` under their new names, where this attempt adds one to them."""
    if before is None or not another_round(run, staging.plan, before):
        return
    for record, name in zip(before.files, names, strict=False):
        if staging.committed(name) is None:
            source = run.path_of(record, staging.plan.output, staging.plan.iteration)
            staging.link_table(record, source, name)


def check_same_prompts(staging: Staging, names: Sequence[str], digests: Sequence[str]) -> None:
    """Raise DataError (exit 3) where a shard that is there was drawn otherwise than it would be now.

    digests: of the prompts of each shard as they are drawn now.
    """
    for name, now in zip(names, digests, strict=True):
        record = staging.committed(name)
        if record is not None and record.labels.get("prompts", now) != now:
            raise DataError(
                f"generate.prompts_sql: {staging.folder / name} holds other prompts than the query gives now;"
                " for the same tables it must always give the same, so nothing in it may ask for the time"
            )
