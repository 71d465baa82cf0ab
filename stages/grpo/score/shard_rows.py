"""shard_rows: one reward over one shard of rollouts: what of it is to be scored, and all its rows."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from grpo.artifacts import ActiveRun, FileRecord
from grpo.config import RewardConfig
from grpo.score.judge.rubric import is_unreadable
from grpo.score.outcome import Key, Outcome, counted, uncounted
from grpo.score.plan import require_source
from grpo.score.scorers import Rollout, rollouts_of
from grpo.score.shard import REPEATED, Shard, found_in, table_of

FAILED = ("error", "timeout", "nonfinite")


class Begun(NamedTuple):
    """A shard with its rollouts; before: their outcomes in an earlier output; kept: those that stay."""

    shard: Shard
    rollouts: list[Rollout]
    before: dict[Key, Outcome]
    kept: dict[Key, Outcome]

    @property
    def todo(self) -> list[Rollout]:
        """What is to be scored, in order."""
        return [rollout for rollout in self.rollouts if rollout.key not in self.kept]


def keep(shard: Shard) -> FileRecord | None:
    """Commit a shard that an earlier output holds as it would be now; None where it does not."""
    reward, old, staging = shard.reward, shard.old, shard.task.staging
    held = old.record.labels if old is not None else {}
    same = all(held.get(name) == _labels(reward).get(name) for name in ("reward", "weight", "on_timeout"))
    if old is None or not same or num_failed(held["statuses"]):
        return None
    if shard.old_answers is not None:
        staging.link_table(*shard.old_answers, shard.answers_name)
    return staging.link_table(*old, shard.name)


def begin(run: ActiveRun, prompts: pa.Table, shard: Shard) -> Begun:
    """Read a shard, and what an earlier output holds of it. Raises as require_source()."""
    require_source(run, shard.reward, shard.source)
    rollouts = rollouts_of(run, shard.rollouts, prompts)
    found = found_in(run, shard.old, Outcome) if shard.old is not None else {}
    before = {key: uncounted(outcome) for key, outcome in found.items()}
    settled = shard.settled()
    kept = {
        key: outcome
        for key, outcome in before.items()
        if counted(outcome, shard.reward.on_timeout).status not in FAILED or key in settled
    }
    return Begun(shard, rollouts, before, kept)


def commit(run: ActiveRun, begun: Begun, outcomes: Mapping[Key, Outcome]) -> FileRecord:
    """Commit the rows of a shard, once all its outcomes are there. Raises as require_source()."""
    shard, task, reward = begun.shard, begun.shard.task, begun.shard.reward
    require_source(run, reward, shard.source)  # a worker that was started meanwhile has imported it anew
    ordered = {each.key: counted(outcomes[each.key], reward.on_timeout) for each in begun.rollouts}
    late = sum(outcome.status == "ok" and outcome.error is not None for outcome in ordered.values())
    if late:
        run.console.say(
            f"{shard.title}: {late} of {len(ordered)} ran into timeout_s (on_timeout counts them)"
        )
    labels = _labels(reward)
    labels["statuses"] = dict(Counter(outcome.status for outcome in ordered.values()))
    if repeated := _repeated(reward, begun.before, ordered):
        labels[REPEATED] = {"timeout_s": reward.timeout_s, "rollouts": repeated}
    data = table_of(shard, task.table, ordered)
    return task.staging.write_shard(task.table, shard.name, data, shard.unit, **labels)


def num_failed(statuses: dict[str, int]) -> int:
    """How many failed, of a count of statuses."""
    return sum(statuses.get(status, 0) for status in FAILED)


def _labels(reward: RewardConfig) -> dict[str, Any]:
    labels: dict[str, Any] = {"reward": reward.name, "weight": reward.weight}
    return labels if reward.on_timeout == "error" else {**labels, "on_timeout": reward.on_timeout}


def _repeated(reward: RewardConfig, before: dict[Key, Outcome], now: dict[Key, Outcome]) -> list[Key]:
    """The rollouts that failed as they had failed before: another try would only fail again.

    Of a judge, where an answer came that cannot be read; an endpoint that was down may be up again.
    """
    found = []
    for key, (_, status, error) in now.items():
        if status not in FAILED or key not in before or before[key].status != status:
            continue
        alike = status == "timeout" or error == before[key].error
        if alike and (reward.judge is None or is_unreadable(error)):
            found.append(key)
    return found
