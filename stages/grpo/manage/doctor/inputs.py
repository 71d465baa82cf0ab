"""inputs: the prompts and the rewards that the configuration names."""

from itertools import islice

from grpo import tables
from grpo.artifacts import ActiveRun
from grpo.config import RewardConfig
from grpo.errors import DataError, GrpoError
from grpo.manage.doctor.check import Check, failed
from grpo.manage.doctor.checkpoint import Checkpoint, find
from grpo.prompts.chat import chat_of, encode
from grpo.prompts.rows import normalised
from grpo.prompts.source import Row
from grpo.prompts.table import OUTPUT, config_of, is_on_hub, source_is_gone
from grpo.score.functions.pool import FunctionPool
from grpo.score.judge.client import Judge
from grpo.score.judge.rubric import rubric_of

NUM_ROWS = 1000  # read of the source; a run reads and checks all


def check_prompts(
    run: ActiveRun, policy: Checkpoint, fetch: bool, output: str = OUTPUT
) -> tuple[Check, list[Row]]:
    """The first rows of prompts, or held-out ones, with their length where the tokenizer is there.

    fetch: get a data set from the hub where the run has not read it yet.
    """
    config = config_of(run, output)
    name, what = config.source, "prompts" if output == OUTPUT else "held-out prompts"
    needed = "prompts" if policy.folder is None else "prompts that leave room for max_new_tokens"
    if not fetch and is_on_hub(config, run.imports) and run.manifest(output, None) is None:
        note = f"{name} is downloaded at the first run; --model downloads it now"
        return Check(what, name, needed, "warning", note), []
    try:
        rows = _first_rows(run, output)
        if not rows:
            raise DataError(f"prompts.source: {name}: holds no prompt")
        length = (
            "" if policy.folder is None else f", the longest {_longest(run, rows, policy, output)} tokens"
        )
    except GrpoError as error:
        return failed(what, name, needed, error), []
    more = "first " if len(rows) == NUM_ROWS else ""
    return Check(what, f"{name}: {more}{len(rows):,} rows{length}", needed), rows


def check_rewards(run: ActiveRun, rows: list[Row], fetch: bool) -> list[Check]:
    """Import every reward function in a worker, as `score` does; look for every reward model and judge."""
    names = {*tables.schema("prompts").names, *(name for row in rows for name in row)}
    columns = sorted(names - {"prompt", "messages"}) if rows else None
    rewards = run.config.score.rewards
    checks = [_check_model(run, reward, fetch) for reward in rewards if reward.model is not None]
    checks += [_check_judge(run, reward, columns) for reward in rewards if reward.judge is not None]
    functions = [reward for reward in rewards if reward.function is not None]
    if functions:
        pool = FunctionPool(run.imports, 1)
        try:
            checks += [_check_function(pool, reward, columns) for reward in functions]
        finally:
            pool.close()
    return checks


def _check_function(pool: FunctionPool, reward: RewardConfig, columns: list[str] | None) -> Check:
    name, needed = f"reward {reward.name}", "a function that can be imported and takes its arguments"
    try:
        pool.check(reward, columns)
    except GrpoError as error:
        return failed(name, str(reward.function), needed, error)
    return Check(name, str(reward.function), needed)


def _check_judge(run: ActiveRun, reward: RewardConfig, columns: list[str] | None) -> Check:
    """Without a request: an answer may cost money."""
    assert reward.judge is not None
    name, needed = f"reward {reward.name}", "a judge with its rubric and its key (nothing is asked)"
    found = f"{reward.judge.model} at {reward.judge.url}"
    try:
        Judge(reward, rubric_of(reward, run.imports, columns)).close()
    except GrpoError as error:
        return failed(name, found, needed, error)
    return Check(name, found, needed)


def _check_model(run: ActiveRun, reward: RewardConfig, fetch: bool) -> Check:
    name, needed = f"reward {reward.name}", "a sequence classifier with one label"
    try:
        found = find(run, str(reward.model), fetch)
    except GrpoError as error:
        return failed(name, str(reward.model), needed, error)
    if found.folder is None:
        note = f"{reward.model} is downloaded at the first run; --model downloads it now"
        return Check(name, str(reward.model), needed, "warning", note)
    return Check(name, f"{reward.model}, {(found.parameters or 0) / 1e6:,.1f}M parameters", needed)


def _first_rows(run: ActiveRun, output: str) -> list[Row]:
    config = config_of(run, output)
    kept = source_is_gone(run, output) or is_on_hub(config, run.imports)
    if kept and run.manifest(output, None) is not None:
        rows: list[Row] = run.read(output, None).slice(0, NUM_ROWS).to_pylist()
        return rows
    return [row for _, row in islice(normalised(config, run.imports), NUM_ROWS)]


def _longest(run: ActiveRun, rows: list[Row], policy: Checkpoint, output: str) -> int:
    """Tokens of the longest prompt. Raises DataError where a run would refuse it."""
    from grpo.models.loading import context_length, load_config, load_tokenizer

    assert policy.folder is not None
    chat = chat_of(config_of(run, output), run.imports)
    lengths = [len(ids) for ids in encode(rows, load_tokenizer(policy.folder), chat)[1]]
    context = context_length(load_config(policy.folder))
    given = run.config.evaluate.max_new_tokens if run.config.evaluate and output != OUTPUT else None
    room = None if context is None else context - (given or run.config.generate.max_new_tokens)
    source, on_long_prompt = config_of(run, output).source, config_of(run, output).on_long_prompt
    fitting = [length for length in lengths if room is None or length <= room]
    if not fitting or (len(fitting) < len(lengths) and on_long_prompt == "error"):
        raise DataError(
            f"prompts.source: {source}: a prompt of {max(lengths)} tokens, but the context"
            f" leaves room for {room} beside max_new_tokens; shorten it, or set prompts.on_long_prompt: skip"
        )
    return max(fitting)
