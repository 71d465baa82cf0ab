"""scorer_pool: shards that are scored in other processes, as `execution.scorers` has them.

This process reads the rollouts and commits the rewards. Functions and reward models have a pool each: a
function needs no GPU, and what has one keeps its models there. Judges stay in this process: a judge's limits
are of all its questions together.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo.artifacts import ActiveRun
from grpo.config import ExecutionConfig, RewardConfig
from grpo.config.execution import ScorersConfig
from grpo.execute import Pool, backend_of
from grpo.score import scorer_worker, shard_rows
from grpo.score.functions.modules import Modules
from grpo.score.functions.workspace import print_line
from grpo.score.scorer_worker import ScorerSettings, ScoringJob, ScoringResult
from grpo.score.scorers import Rollout, calls_of, texts_of
from grpo.score.shard import Shard

if TYPE_CHECKING:
    from grpo.score.model_worker import ModelJob

_CLOSE_S = 10.0  # in which a scorer that is to end has ended the processes that it started
_JobOf = Callable[[shard_rows.Begun], Any]


@contextmanager
def open_pools(
    run: ActiveRun, execution: ExecutionConfig, scorers: ScorersConfig
) -> Iterator[dict[str, Pool]]:
    """By kind of reward, `function` and `model`, where one is configured: a pool, of which nothing runs yet.

    Raises as backend_of(), and InputError (exit 4) where a reward model is not there.
    """
    opening = {"function": _open_for_functions, "model": _open_for_models}
    rewards = run.config.score.rewards
    kinds = [kind for kind in opening if any(getattr(reward, kind) is not None for reward in rewards)]
    with ExitStack() as stack:
        yield {kind: stack.enter_context(closing(opening[kind](run, execution, scorers))) for kind in kinds}


def _open_for_functions(run: ActiveRun, execution: ExecutionConfig, scorers: ScorersConfig) -> Pool:
    workers = run.config.score.workers
    opener = scorer_worker.opener(ScorerSettings.of_driver(workers))
    backend = backend_of(execution, opener, workers, 0, grace_s=_CLOSE_S)
    # A function may cost money, so none is called twice for being slow, and its own timeout_s bounds it.
    return Pool(backend, scorers.count, copies=False, timeout_s=math.inf)


def _open_for_models(run: ActiveRun, execution: ExecutionConfig, scorers: ScorersConfig) -> Pool:
    from grpo.score.model_worker import ModelSettings, opener

    settings = ModelSettings.of_driver(run, "cuda" if scorers.gpus else "cpu")
    backend = backend_of(execution, opener(settings), settings.threads, scorers.gpus, grace_s=_CLOSE_S)
    return Pool(backend, scorers.count, timeout_s=math.inf)  # timeout_s of a reward bounds each batch


def check_models(run: ActiveRun, workers: Pool) -> None:
    """Have each reward model opened by a worker, before rollouts are paid for. Raises as RewardModel."""
    models = [reward for reward in run.config.score.rewards if reward.model is not None]
    jobs = {reward.name: _model_job(run, reward, []) for reward in models}
    for _ in workers.run(jobs, "reward models", run.console.stop_requested):
        pass


def score_elsewhere(
    run: ActiveRun, pools: Mapping[str, Pool], prompts: pa.Table, shards: Sequence[Shard]
) -> None:
    """Commit the shards of functions and reward models among `shards`, as they come.

    Raises Interrupted, with those under way committed, when a signal asked to stop.
    """
    making = {"function": _function_jobs, "model": _model_jobs}
    for kind, workers in pools.items():
        own = [shard for shard in shards if getattr(shard.reward, kind) is not None]
        if todo := _to_score(run, prompts, own):
            _score(run, workers, _Jobs(run, prompts, todo, making[kind](run, workers)))


def _score(run: ActiveRun, workers: Pool, jobs: "_Jobs") -> None:
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


def _to_score(run: ActiveRun, prompts: pa.Table, shards: Sequence[Shard]) -> dict[str, Shard]:
    """Those that need a worker, by name; what an earlier output holds of others is committed."""
    found = {}
    for shard in shards:
        if shard.task.staging.committed(shard.name) is not None:
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


def _function_jobs(run: ActiveRun, workers: Pool) -> _JobOf:
    here = workers.is_one_machine
    modules = Modules.none(run.imports) if here else Modules.of(run.imports, run.root)

    def job_of(begun: shard_rows.Begun) -> ScoringJob:
        shard = begun.shard
        calls = list(calls_of(shard.task.iteration, begun.todo))
        return ScoringJob(shard.reward, shard.source, modules, calls)

    return job_of


def _model_jobs(run: ActiveRun, workers: Pool) -> _JobOf:
    return lambda begun: _model_job(run, begun.shard.reward, begun.todo)


def _model_job(run: ActiveRun, reward: RewardConfig, rollouts: Sequence[Rollout]) -> "ModelJob":
    from grpo.score.model_worker import ModelJob

    limit = run.config.score.max_tokens_per_batch
    return ModelJob(reward.name, *texts_of(rollouts), limit, reward.timeout_s)


class _Jobs(Mapping[str, Any]):
    """A job for each shard, read when it is handed out: no more rollouts are in memory than are scored."""

    def __init__(self, run: ActiveRun, prompts: pa.Table, shards: dict[str, Shard], job_of: _JobOf) -> None:
        self._run, self._prompts, self._shards, self._job_of = run, prompts, shards, job_of
        self._begun: dict[str, shard_rows.Begun] = {}

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

    def __getitem__(self, name: str) -> Any:
        begun = self._begun[name] = shard_rows.begin(self._run, self._prompts, self._shards[name])
        return self._job_of(begun)

    def __contains__(self, name: object) -> bool:
        return name in self._shards  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)
