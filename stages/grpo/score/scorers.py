"""scorers: rollouts -> outcomes, by reward functions and models; judges are asked in judge/answers.py."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from grpo.artifacts import ActiveRun
from grpo.config import Config, RewardConfig
from grpo.errors import CorruptError, UsageError
from grpo.models.device import gpu_is_there
from grpo.prompts.rows import as_given
from grpo.score.functions.built_in import BUILT_IN, Text
from grpo.score.functions.call import GroupCall, find_problem
from grpo.score.functions.pool import FunctionPool
from grpo.score.judge.client import Judge
from grpo.score.judge.rubric import rubric_of
from grpo.score.outcome import Key, Outcome
from grpo.score.shard import File, read
from grpo.tables import RENDERED

if TYPE_CHECKING:
    from grpo.execute import Pool
    from grpo.score.reward_model import RewardModel
    from grpo.score.teachers import Teacher

_READ = ["group_id", "sample_id", "prompt_id", "response", "response_token_ids"]


class Scorers(NamedTuple):
    """What stays open between iterations: worker processes, the prompts, reward models, judges, teachers."""

    pool: FunctionPool
    prompts: pa.Table
    models: "dict[str, RewardModel]"
    judges: dict[str, Judge]
    teachers: "dict[str, Teacher]"
    workers: "dict[str, Pool]"  # by kind, in place of `pool` and `models`: scorers in other processes


class Rollout(NamedTuple):
    """What a reward sees of one rollout; the completion of a chat prompt is messages too."""

    key: Key
    prompt: Text
    completion: Text
    response: str
    token_ids: list[int]
    columns: dict[str, Any]


@contextmanager
def open_scorers(run: ActiveRun, lend: object) -> Iterator[Scorers]:
    """Start the workers, open the judges, load the reward models and the teachers.

    Raises UsageError (exit 2) for a function that is no use, and a judge without key, package or rubric.
    """
    prompts = run.read("prompts", None)
    judges = {}
    with ExitStack() as stack:
        workers = stack.enter_context(_open_workers(run))
        num_workers = 1 if workers else run.config.score.workers  # to check functions with
        pool = stack.enter_context(closing(FunctionPool(run.imports, num_workers)))
        check_columns(run, pool, prompts)
        for reward in run.config.score.rewards:
            if reward.judge is not None:
                judge = Judge(reward, rubric_of(reward, run.imports))
                judges[reward.name] = stack.enter_context(closing(judge))
        models = _open_models(run, workers)
        for model in models.values():
            stack.enter_context(closing(model))
        yield Scorers(pool, prompts, models, judges, _open_teachers(run), workers)


def check_alone(run: ActiveRun) -> None:
    """Raise UsageError (exit 2) for a function or a judge that is no use with whatever prompts."""
    check_place(run.config)
    with ExitStack() as stack:
        pool: FunctionPool | None = None
        for reward in run.config.score.rewards:
            if reward.judge is not None:
                Judge(reward, rubric_of(reward, run.imports)).close()
            elif reward.function in BUILT_IN:  # at once; a worker takes a second to start
                if problem := find_problem(reward.function, reward.arguments, None, None):
                    raise UsageError(f"reward function {reward.function!r}: {problem}")
            elif reward.function is not None:
                pool = pool or stack.enter_context(closing(FunctionPool(run.imports, 1)))
                pool.check(reward)


def check_columns(run: ActiveRun, pool: FunctionPool, prompts: pa.Table) -> None:
    """Raise UsageError (exit 2) for a function or a rubric that cannot do with the columns of `prompts`."""
    columns, empty = _columns(prompts)
    for reward in run.config.score.rewards:
        if reward.function is not None:
            pool.check(reward, columns, empty)
        if reward.judge is not None:
            rubric_of(reward, run.imports, columns, empty)


def renew_rubrics(run: ActiveRun, opened: Scorers) -> None:
    """Take the rubrics as they are now: one that was edited is planned with from then on."""
    for reward in run.config.score.rewards:
        if reward.judge is not None:
            opened.judges[reward.name].rubric = rubric_of(reward, run.imports, *_columns(opened.prompts))


def _columns(prompts: pa.Table) -> tuple[list[str], set[str]]:
    """Those that rewards may ask for, and which of them are empty."""
    columns = [name for name in prompts.column_names if name not in ("prompt", "messages", RENDERED)]
    return columns, empty_columns(prompts) - {RENDERED}


def empty_columns(prompts: pa.Table) -> set[str]:
    """The columns without a value in any row; a text of nothing but spaces is none."""

    def is_empty(column: pa.ChunkedArray) -> bool:
        if column.null_count == len(column):
            return True
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        return is_text and not pc.any(pc.not_equal(pc.utf8_trim_whitespace(column), "")).as_py()

    return {name for name in prompts.column_names if is_empty(prompts[name])} - {"prompt", "messages"}


def _open_models(run: ActiveRun, workers: "Mapping[str, Pool]") -> "dict[str, RewardModel]":
    if "model" in workers:
        from grpo.score.scorer_pool import check_models

        check_models(run, workers["model"])
    wanted = {reward.name: str(reward.model) for reward in models_here(run.config)}
    if not wanted:
        return {}
    from grpo.models.loading import best_device
    from grpo.score.reward_model import RewardModel

    device, stop = best_device(), run.console.stop_requested
    return {name: RewardModel(run.checkpoint_path(model), device, stop) for name, model in wanted.items()}


def _open_teachers(run: ActiveRun) -> "dict[str, Teacher]":
    if not run.config.score.teachers:
        return {}
    from grpo.score.teachers import open_teachers

    return open_teachers(run)


def _open_workers(run: ActiveRun) -> "AbstractContextManager[dict[str, Pool]]":
    execution = run.config.execution
    if execution is None or execution.scorers is None:
        return nullcontext({})
    from grpo.score.scorer_pool import open_pools

    check_place(run.config)
    return open_pools(run, execution, execution.scorers)


def models_here(config: Config) -> list[RewardConfig]:
    """The reward models that this process holds."""
    is_elsewhere = config.execution is not None and config.execution.scorers is not None
    return [] if is_elsewhere else [reward for reward in config.score.rewards if reward.model is not None]


def check_place(config: Config) -> None:
    """Raise UsageError (exit 2) where scorers would compute reward models otherwise than this process."""
    scorers = None if config.execution is None else config.execution.scorers
    has_models = any(reward.model is not None for reward in config.score.rewards)
    if has_models and scorers is not None and not scorers.gpus and gpu_is_there():
        raise UsageError(
            "execution.scorers.gpus: 0, but this machine computes on a GPU, and reward models would on a CPU;"
            " `scorers: null` scores in this process, or give each scorer a GPU of a Ray cluster"
        )


def rollouts_of(run: ActiveRun, file: File, prompts: pa.Table) -> list[Rollout]:
    """The rollouts of a shard, each with its row of `prompts`."""
    rows = read(run, str(file.record.table), [file], _READ)
    wanted = prompts.filter(pc.is_in(prompts["prompt_id"], rows["prompt_id"]))
    prompt_of = {row["prompt_id"]: row for row in wanted.to_pylist()}
    rollouts = []
    for row in rows.to_pylist():
        key, response = (row["group_id"], row["sample_id"]), row["response"]
        if row["prompt_id"] not in prompt_of:
            raise CorruptError(
                f"{file.path}: rollout {key}: prompt_id {row['prompt_id']} is no row of prompts"
            )
        columns = dict(prompt_of[row["prompt_id"]])
        prompt, messages, _ = columns.pop("prompt"), columns.pop("messages"), columns.pop(RENDERED, None)
        completion: Text = response
        if messages is not None:
            prompt, completion = as_given(messages), [{"role": "assistant", "content": response}]
        rollouts.append(Rollout(key, prompt, completion, response, row["response_token_ids"], columns))
    return rollouts


def score(
    run: ActiveRun, opened: Scorers, iteration: int, reward: RewardConfig, rollouts: Sequence[Rollout]
) -> Iterator[tuple[Rollout, Outcome]]:
    """(rollout, outcome) of each: a function gets one group per call, a model batches of tokens."""
    outcomes: Iterable[Outcome]
    if reward.function is not None:
        outcomes = chain.from_iterable(opened.pool.score(reward, calls_of(iteration, rollouts)))
    else:
        prompts, completions = texts_of(rollouts)
        limit = run.config.score.max_tokens_per_batch
        outcomes = opened.models[reward.name].score(prompts, completions, limit, reward.timeout_s)
    return zip(rollouts, outcomes, strict=True)


def texts_of(rollouts: Sequence[Rollout]) -> tuple[list[Text], list[Text]]:
    """Prompts and completions, which a reward model reads."""
    return [rollout.prompt for rollout in rollouts], [rollout.completion for rollout in rollouts]


def calls_of(iteration: int, rollouts: Sequence[Rollout]) -> Iterator[GroupCall]:
    """What a function is given of rollouts in key order: a call for each group."""
    for _, group in groupby(rollouts, key=lambda rollout: rollout.key[0]):
        yield _call(iteration, list(group))


def _call(iteration: int, group: list[Rollout]) -> GroupCall:
    return GroupCall(
        prompts=[rollout.prompt for rollout in group],
        completions=[rollout.completion for rollout in group],
        completion_ids=[rollout.token_ids for rollout in group],
        columns={name: [rollout.columns[name] for rollout in group] for name in group[0].columns},
        iteration=iteration,
    )
