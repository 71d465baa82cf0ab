"""artifacts.partial: what a committed output still lacks, read from manifests alone.

What lacks something is partial: the stage behind it refuses it, and the command that made it goes on with
it as a new attempt. Rewards that failed are scored again. With generate.dynamic_sampling, rollouts whose
rewards show too few groups with signal get another round, and rewards of the rounds before score only that.
"""

from grpo.artifacts.active import ActiveRun
from grpo.artifacts.manifest import Manifest, id_of
from grpo.artifacts.run import Run


def lacking(run: ActiveRun, manifest: Manifest | None) -> str:
    """What an output lacks; empty: nothing. Examples: `3 rewards failed`, `5 of 8 groups with signal ...`."""
    if manifest is not None and manifest.stage == "score":
        return _failed(run, manifest) or unscored_rounds(run, manifest)
    if manifest is not None and manifest.stage == "evaluate":
        return _failed(run, manifest)
    if manifest is not None and manifest.stage == "generate":
        return _without_signal(run, manifest)
    return ""


def rounds_in(rollouts: Manifest, rollouts_id: str) -> int:
    """How many of its rounds `rollouts` had when it had this id; 0: it never had."""
    if rollouts_id == rollouts.ids.get("rollouts"):
        return num_rounds(rollouts)
    per_round = len(rollouts.files) // num_rounds(rollouts)
    earlier = range(1, num_rounds(rollouts))
    return next((n for n in earlier if id_of(rollouts.files[: n * per_round]) == rollouts_id), 0)


def num_rounds(rollouts: Manifest) -> int:
    """Rounds of prompts that rollouts were sampled in; each has as many shards."""
    return int(rollouts.summary.get("rounds", 1))


def unscored_rounds(run: Run, rewards: Manifest) -> str:
    """How many rounds of the rollouts that are there these rewards are of; empty: all, or other rollouts."""
    recorded = rewards.inputs.get(f"rollouts@{rewards.iteration}")
    rollouts = run.manifest("rollouts", rewards.iteration)
    if recorded is None or rollouts is None:
        return ""
    scored, there = rounds_in(rollouts, recorded), num_rounds(rollouts)
    return f"{scored} of {there} rounds are scored" if 0 < scored < there else ""


def _failed(run: ActiveRun, rewards: Manifest) -> str:
    failed = rewards.summary.get("failed")
    return f"{failed} rewards failed" if failed and run.config.score.on_error == "stop" else ""


def _without_signal(run: ActiveRun, rollouts: Manifest) -> str:
    """Decided by what the rollouts were planned with; `dynamic_sampling: null` goes on with what is there.

    Rollouts that have advantages were gone on with: those are history.
    """
    planned = rollouts.config.get("generate", {}).get("dynamic_sampling")
    if planned is None or run.config.generate.dynamic_sampling is None or _have_advantages(run, rollouts):
        return ""
    rewards = run.manifest("rewards", rollouts.iteration)
    current = rewards and rewards.inputs.get(f"rollouts@{rollouts.iteration}") == rollouts.ids["rollouts"]
    if not rewards or not current or _failed(run, rewards):
        return ""  # not known yet
    # None: scored before anybody asked.
    rounds, found = num_rounds(rollouts), int(rewards.summary.get("groups_with_signal") or 0)
    wanted = int(planned["min_groups"])
    if found >= wanted or rounds >= planned["max_rounds"]:
        return ""
    return f"{found} of {wanted} groups with signal after round {rounds - 1}"


def _have_advantages(run: Run, rollouts: Manifest) -> bool:
    advantages = run.manifest("advantages", rollouts.iteration)
    read = advantages.inputs.get(f"rollouts@{rollouts.iteration}") if advantages else None
    return read == rollouts.ids["rollouts"]
