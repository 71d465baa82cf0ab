"""replay: the kept rollouts that an update trains on, of its own iteration and those before.

update.replay_iterations takes the newest earlier ones along. An older rollout keeps the log-probs that its
own policy sampled it with, so its importance ratio is a true one, and the advantage that its group gave it.
"""

from itertools import chain

import pyarrow as pa

from grpo.artifacts import ActiveRun, Run
from grpo.update.batch import READ, Rollouts, kept_rollouts
from grpo.update.plan import iterations_of


def read_kept(run: ActiveRun, iteration: int) -> Rollouts:
    """The kept rollouts of all of them, in key order."""
    numbers = iterations_of(run, iteration)
    shards = chain.from_iterable(run.read_shards("rollouts", number, READ) for number in numbers)
    advantages = pa.concat_tables([run.read("advantages", number) for number in numbers])
    return kept_rollouts(shards, advantages)


def longest(run: ActiveRun, iteration: int) -> tuple[int, int]:
    """Tokens of the run's longest prompt, and the most that a response may have."""
    prompts = run.require("prompts", None, "grpo run")
    responses = (max_new_tokens_of(run, number) for number in iterations_of(run, iteration))
    return int(prompts.summary["longest_prompt_tokens"]), max(responses)


def max_new_tokens_of(run: Run, iteration: int) -> int:
    """What the rollouts of an iteration were sampled with: it may have changed since."""
    rollouts = run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    return int(rollouts.config["generate"]["max_new_tokens"])
