"""scorer_pool: shards that reward functions score in other processes, as `execution.scorers` has them.

This process reads the rollouts and commits the rewards. Reward models and judges stay in it: a judge's limits
are of all its questions together.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing

import pyarrow as pa

from grpo.artifacts import ActiveRun
from grpo.config import ExecutionConfig
from grpo.execute import Pool, backend_of
from grpo.score import shard_rows
from grpo.score.functions.modules import Modules
from grpo.score.functions.workspace import print_line
from grpo.score.scorer_worker import ScorerSettings, ScoringJob, ScoringResult, opener
from grpo.score.scorers import calls_of
from grpo.score.shard import Shard

_CLOSE_S = 10.0  # in which a scorer that is to end has ended the processes that call functions


def open_scorer_pool(run: ActiveRun, execution: ExecutionConfig, count: int) -> Pool:
    """A pool of `count` scorers, none of which is started yet. Raises as backend_of()."""
    num_workers = run.config.score.workers
    backend = backend_of(
        execution, opener(ScorerSettings.of_driver(num_workers)), num_workers, 0, grace_s=_CLOSE_S
    )
    # A function may cost money, so none is called twice for being slow, and its own timeout_s bounds it.
    return Pool(backend, count, copies=False, timeout_s=math.inf)


def score_functions(run: ActiveRun, workers: Pool, prompts: pa.Table, shards: list[Shard]) -> None:
    """Commit the shards of reward functions among `shards`, as they come.

    Raises Interrupted, with those under way committed, when a signal asked to stop.
    """
    jobs = _Jobs(run, workers, prompts, _to_score(run, prompts, shards))
    if not jobs:
        return
    plan = jobs.first.task.staging.plan
    what = f"{plan.stage} {plan.iteration}"
    with (
        run.console.progress(what, jobs.num_rewards, "rewards") as advance,
        closing(workers.run(jobs, what, lambda: None, run.console.is_stopping)) as results,
    ):
        started = time.perf_counter()
        for name, result in results:
            shard = jobs.commit(name, result)
            seconds, now = shard.task.staging.seconds, time.perf_counter()
            seconds[shard.reward.name] = seconds.get(shard.reward.name, 0.0) + now - started
            started = now
            advance(shard.num_rollouts)
    run.console.stop_requested()


def _to_score(run: ActiveRun, prompts: pa.Table, shards: list[Shard]) -> dict[str, Shard]:
    """Those that need a function, by name; what an earlier output holds of others is committed."""
    found = {}
    for shard in shards:
        if shard.reward.function is None or shard.task.staging.committed(shard.name) is not None:
            continue
        if shard.old is not None:
            if shard_rows.keep(shard) is not None:
                continue
            begun = shard_rows.begin(run, prompts, shard)
            if not begun.todo:
                shard_rows.commit(run, begun, begun.kept)
                continue
        found[f"{shard.reward.name}/{shard.name}"] = shard
    return found


class _Jobs(Mapping[str, ScoringJob]):
    """A job for each shard, read when it is handed out: no more rollouts are in memory than are scored."""

    def __init__(self, run: ActiveRun, workers: Pool, prompts: pa.Table, shards: dict[str, Shard]) -> None:
        self._run, self._prompts, self._shards = run, prompts, shards
        self._begun: dict[str, shard_rows.Begun] = {}
        here = not shards or workers.is_one_machine
        self._modules = Modules.none(run.imports) if here else Modules.of(run.imports, run.root)

    @property
    def first(self) -> Shard:
        """Any of the shards."""
        return next(iter(self._shards.values()))

    @property
    def num_rewards(self) -> int:
        """Of all of them, those that are kept included."""
        return sum(shard.num_rollouts for shard in self._shards.values())

    def commit(self, name: str, result: ScoringResult) -> Shard:
        """Commit the shard that the job `name` was of."""
        begun = self._begun.pop(name)
        for line in result.said:
            print_line(line)
        scored = zip((rollout.key for rollout in begun.todo), result.outcomes, strict=True)
        shard_rows.commit(self._run, begun, {**begun.kept, **dict(scored)})
        return begun.shard

    def __getitem__(self, name: str) -> ScoringJob:
        shard = self._shards[name]
        begun = self._begun[name] = shard_rows.begin(self._run, self._prompts, shard)
        calls = list(calls_of(shard.task.iteration, begun.todo))
        source = shard.task.staging.plan.user_files[f"score.rewards.{shard.reward.name}"]
        return ScoringJob(shard.reward, source, self._modules, calls)

    def __contains__(self, name: object) -> bool:
        return name in self._shards  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)
