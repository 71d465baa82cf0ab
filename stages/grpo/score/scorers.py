"""scorers: rollouts -> outcomes, by whatever kind a reward is; nothing of a run is written here."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grpo.artifacts import ActiveRun
from grpo.config import RewardConfig
from grpo.score.functions.call import FunctionSpec, GroupCall
from grpo.score.functions.pool import FunctionPool
from grpo.score.judge.client import Judge
from grpo.score.judge.completion import Judgement
from grpo.score.judge.rubric import question, read_score, rubric_of, where
from grpo.score.outcome import Outcome

if TYPE_CHECKING:
    from grpo.score.reward_model import RewardModel

Key = tuple[int, int]
"""(group_id, sample_id): unique within an iteration."""


@dataclass
class Scorers:
    """What stays open between iterations: worker processes, reward models, judges, the prompts."""

    pool: FunctionPool
    prompts: pa.Table
    columns: list[str]
    models: "dict[str, RewardModel]"
    judges: dict[str, Judge]
    rubrics: dict[str, str]
    """Name of a judge -> the text of its rubric."""


@dataclass(frozen=True)
class Rollout:
    """What a reward sees of one rollout."""

    group_id: int
    sample_id: int
    prompt_id: int
    response: str
    response_token_ids: list[int]

    @property
    def key(self) -> Key:
        """(group_id, sample_id)."""
        return self.group_id, self.sample_id


@contextmanager
def open_scorers(run: ActiveRun) -> Iterator[Scorers]:
    """Start the workers, load the reward models, open the judges.

    Raises UsageError (exit 2) for a function that is no use, and a judge without key, package or rubric.
    """
    prompts = run.read("prompts", None)
    columns = columns_of(prompts)
    rewards = run.config.score.rewards
    rubrics = {
        reward.name: rubric_of(reward, run.imports, columns) for reward in rewards if reward.judge is not None
    }
    with ExitStack() as stack:
        judges = {}
        for reward in rewards:
            if reward.judge is not None:
                judges[reward.name] = Judge(where(reward), reward.judge, reward.timeout_s)
                stack.callback(judges[reward.name].close)
        pool = FunctionPool(run.imports, run.config.score.workers)
        stack.callback(pool.close)
        for reward in rewards:
            if reward.function is not None:
                pool.check(spec_of(reward), columns)
        yield Scorers(pool, prompts, columns, _open_models(run), judges, rubrics)


def _open_models(run: ActiveRun) -> "dict[str, RewardModel]":
    rewards = [reward for reward in run.config.score.rewards if reward.model is not None]
    if not rewards:
        return {}
    from grpo.models.loading import best_device
    from grpo.score.reward_model import RewardModel

    return {
        reward.name: RewardModel(run.checkpoint_path(str(reward.model)), best_device()) for reward in rewards
    }


def columns_of(prompts: pa.Table) -> list[str]:
    """Columns of a prompts table that reward functions get by name."""
    return [name for name in prompts.column_names if name not in ("prompt", "messages")]


def spec_of(reward: RewardConfig) -> FunctionSpec:
    """A configured reward function as the workers are told of it."""
    return FunctionSpec(str(reward.function), reward.arguments, reward.timeout_s)


def score(
    run: ActiveRun, tool: Scorers, iteration: int, reward: RewardConfig, rollouts: Sequence[Rollout]
) -> Iterator[tuple[Rollout, Outcome]]:
    """(rollout, outcome) of each: a function gets one group per call, a model batches of tokens."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    rows = _prompts_of(tool, rollouts)
    calls = [_call(tool, iteration, rows, members) for members in groups.values()]
    outcomes: Iterable[Outcome]
    if reward.function is not None:
        outcomes = chain.from_iterable(tool.pool.score(spec_of(reward), calls))
    else:
        prompts = [prompt for call in calls for prompt in call.prompts]
        completions = [completion for call in calls for completion in call.completions]
        limit = run.config.score.max_tokens_per_batch
        outcomes = tool.models[reward.name].score(prompts, completions, limit, reward.timeout_s)
    return zip(chain.from_iterable(groups.values()), outcomes, strict=True)


NOT_APPLICABLE = Outcome(None, "not_applicable")


def questions(tool: Scorers, reward: RewardConfig, rollouts: Sequence[Rollout]) -> dict[Key, str | None]:
    """What a judge is asked of each rollout; None where the rubric wants an answer and there is none."""
    rows = _prompts_of(tool, rollouts)
    rubric = tool.rubrics[reward.name]
    found = {}
    for rollout in rollouts:
        row = rows[rollout.prompt_id]
        prompt = row["prompt"] if row["messages"] is None else row["messages"]
        columns = {name: row[name] for name in tool.columns}
        found[rollout.key] = question(rubric, prompt, rollout.response, columns)
    return found


def ask(
    run: ActiveRun, tool: Scorers, reward: RewardConfig, asked: dict[Key, str]
) -> Generator[dict[Key, Judgement], None, None]:
    """Answers of a judge as they come. They end early when a signal asks to stop."""
    keys = list(asked)
    judge = tool.judges[reward.name]
    with closing(judge.ask(list(asked.values()), run.console.is_stopping)) as batches:
        for batch in batches:
            yield {keys[place]: said for place, said in batch}


def outcome_of(reward: RewardConfig, said: Judgement) -> Outcome:
    """The reward that a judgement gives."""
    assert reward.judge is not None
    if said.answer is None:
        return Outcome(None, said.status, said.error)
    return read_score(reward.judge, said.answer)


def _prompts_of(tool: Scorers, rollouts: Sequence[Rollout]) -> dict[int, dict[str, Any]]:
    """The rows of `prompts` that the rollouts need, by prompt_id."""
    wanted = np.unique([rollout.prompt_id for rollout in rollouts]).astype(np.int64)
    places = np.searchsorted(tool.prompts["prompt_id"].to_numpy(), wanted)  # the table is in this order
    return {row["prompt_id"]: row for row in tool.prompts.take(places).to_pylist()}


def _call(
    tool: Scorers, iteration: int, prompts: dict[int, dict[str, Any]], rollouts: list[Rollout]
) -> GroupCall:
    """A group as a reward function sees it; a chat prompt is messages, and so is its completion."""
    rows = [prompts[rollout.prompt_id] for rollout in rollouts]
    chat = [row["messages"] is not None for row in rows]
    return GroupCall(
        prompts=[row["messages"] if c else row["prompt"] for row, c in zip(rows, chat, strict=True)],
        completions=[
            [{"role": "assistant", "content": rollout.response}] if c else rollout.response
            for rollout, c in zip(rollouts, chat, strict=True)
        ],
        completion_ids=[rollout.response_token_ids for rollout in rollouts],
        columns={name: [row[name] for row in rows] for name in tool.columns},
        iteration=iteration,
    )
