"""inputs: the prompts and the rewards that the configuration names."""

from contextlib import closing
from itertools import islice
from pathlib import Path

from grpo import tables
from grpo.artifacts import ActiveRun
from grpo.errors import DataError
from grpo.manage.doctor.checkpoint import Checkpoint, check_model
from grpo.manage.doctor.report import Report
from grpo.models.loading import context_length, load_config, load_tokenizer
from grpo.prompts.chat import chat_of, encode
from grpo.prompts.rows import normalised
from grpo.prompts.source import Row
from grpo.prompts.table import HELD_OUT, OUTPUT, config_of, is_on_hub, source_is_gone, usable
from grpo.score.functions.pool import FunctionPool
from grpo.score.judge.client import Judge
from grpo.score.judge.rubric import rubric_of, where
from grpo.score.scorers import spec_of

NUM_ROWS = 1000  # read of the source; a run reads and checks all


def check_prompts(
    run: ActiveRun, report: Report, policy: Checkpoint, fetch: bool, output: str = OUTPUT
) -> list[Row]:
    """The first rows of prompts, or held-out ones, with their length where the tokenizer is there.

    fetch: get a data set from the hub where the run has not read it yet. No rows where they cannot be used.
    """
    config, rows = config_of(run, output), list[Row]()
    needed = "prompts" if policy.folder is None else "prompts that leave room for max_new_tokens"
    name = "prompts" if output == OUTPUT else "held-out prompts"
    with report.check(name, config.source, needed) as check:
        if not fetch and is_on_hub(config, run.imports) and run.manifest(output, None) is None:
            check.warn(f"{config.source} is downloaded at the first run; --model downloads it now")
            return rows
        found = _first_rows(run, output)
        if not found:
            raise DataError(f"prompts.source: {config.source}: holds no prompt")
        longest = "" if policy.folder is None else _longest(run, found, policy.folder, output)
        more = "first " if len(found) == NUM_ROWS else ""
        check.found = f"{config.source}: {more}{len(found):,} rows{longest}"
        rows += [row for _, row in found]
    return rows


def _first_rows(run: ActiveRun, output: str) -> list[tuple[str, Row]]:
    """(place, row) from the source, or from the run where that is what will be used."""
    config = config_of(run, output)
    kept = source_is_gone(run, output) or is_on_hub(config, run.imports)
    if kept and run.manifest(output, None) is not None:
        rows = run.read(output, None).slice(0, NUM_ROWS).to_pylist()
        return [(f"{run.folder(output, None)}: prompt {row['prompt_id']}", row) for row in rows]
    return list(islice(normalised(config, run.imports), NUM_ROWS))


def _longest(run: ActiveRun, rows: list[tuple[str, Row]], policy: Path, output: str) -> str:
    """How long the longest prompt is. Raises DataError where a run would refuse one."""
    config, tokenizer = config_of(run, output), load_tokenizer(policy)
    chat, context = chat_of(config, run.imports), context_length(load_config(policy))
    held_out = run.config.evaluate if output == HELD_OUT else None
    given = (held_out and held_out.max_new_tokens) or run.config.generate.max_new_tokens
    room = None if context is None else context - given

    def num_tokens(rows: list[Row]) -> list[int]:
        return [len(ids) for ids in encode(rows, tokenizer, chat)[1]]

    kept = usable(rows, num_tokens, room, config, set())
    if not kept:
        raise DataError(f"prompts.source: {config.source}: holds no prompt that can be used")
    return f", the longest {max(length for _, length in kept)} tokens"


def check_rewards(run: ActiveRun, report: Report, rows: list[Row], fetch: bool) -> None:
    """Import every reward function in a worker, as `score` does; look for every reward model and judge."""
    names = {*tables.schema("prompts").names, *(name for row in rows for name in row)}
    columns = sorted(names - {"prompt", "messages"}) if rows else None
    with closing(FunctionPool(run.imports, 1)) as pool:
        for reward in run.config.score.rewards:
            name, judge = f"reward {reward.name}", reward.judge
            if reward.function is not None:
                needed = "a function that can be imported and takes its arguments"
                with report.check(name, reward.function, needed):
                    pool.check(spec_of(reward), columns)
            elif judge is not None:  # without a request: an answer may cost money
                needed = "a judge with its rubric and its key (nothing is asked)"
                with report.check(name, f"{judge.model} at {judge.url}", needed):
                    rubric_of(reward, run.imports, columns)
                    Judge(where(reward), judge, reward.timeout_s).close()
            else:
                needed = "a sequence classifier with one label"
                check_model(run, report, name, str(reward.model), fetch, needed)
