"""begin: what a run commits once, and loads models for: its prompts, and the ids of what it starts from."""

from collections.abc import Callable
from pathlib import Path

from grpo.artifacts import ActiveRun, Plan, Product, Staging
from grpo.errors import UsageError
from grpo.models import weight_check
from grpo.models.loading import context_length, load_config, load_model, load_tokenizer
from grpo.prompts import table as prompts
from grpo.prompts.chat import chat_of, encode
from grpo.prompts.source import Row

STAGE_VERSION = 2  # of `policy`; 2: with a weight check


def commit_policy(run: ActiveRun, names: dict[str, str], ids: dict[str, str]) -> None:
    """Commit the ids of the starting policy and the reference, and the policy's weight check.

    Raises what load_model does for either: a reference that cannot be used is not found at the first update.
    """
    attention = run.config.model_options.attn_implementation
    if run.config.update.kl_coefficient and ids["reference"] != ids["policy"]:
        load_model(run.start["reference"], "cpu", attention)
    rows = run.read(prompts.OUTPUT, None).slice(0, weight_check.NUM_PROMPTS).to_pylist()
    plan = Plan("policy", STAGE_VERSION, "policy", None, names, {}, ids)
    staging = Staging(run, plan, 0)
    chat = chat_of(run.config.prompts, run.imports)
    found = weight_check.weight_check_of(run.start["policy"], rows, chat, attention)
    record = staging.write_bytes("", weight_check.FILE, found.encode())
    paths = {part: str(path) for part, path in run.start.items()}
    staging.commit(Product(ids, [record], paths))


def normalise(run: ActiveRun, plan: Plan, expected: str | None = None) -> None:
    """Write prompts, or held-out ones, that leave room for max_new_tokens in the model's context."""
    num_tokens, room = lengths(run, run.start["policy"], plan.output)
    prompts.prepare(run, Staging(run, plan, 0), num_tokens, room, expected)


def lengths(run: ActiveRun, policy: Path, output: str) -> tuple[Callable[[list[Row]], list[int]], int | None]:
    """Counts tokens of prompts as `policy` sees them; and the most that leave room, None: there is no limit.

    Raises UsageError (exit 2) where max_new_tokens leave none.
    """
    key, limit = "generate", run.config.generate.max_new_tokens
    if output != prompts.OUTPUT and run.config.evaluate is not None:
        key, limit = "evaluate", run.config.evaluate.max_new_tokens or limit
    context = context_length(load_config(policy))
    if context is not None and limit >= context:
        raise UsageError(
            f"{key}.max_new_tokens: {limit} leaves no room for a prompt in the model's context of"
            f" {context} tokens"
        )
    chat, tokenizer = chat_of(prompts.config_of(run, output), run.imports), load_tokenizer(policy)

    def num_tokens(rows: list[Row]) -> list[int]:
        return [len(ids) for ids in encode(rows, tokenizer, chat)[1]]

    return num_tokens, None if context is None else context - limit
