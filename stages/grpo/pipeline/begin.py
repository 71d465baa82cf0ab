"""begin: what a run commits once, and loads models for: its prompts, and the ids of what it starts from."""

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
    if run.config.update.kl_coefficient and ids["reference"] != ids["policy"]:
        load_model(run.start["reference"], "cpu")
    rows = run.read(prompts.OUTPUT, None).slice(0, weight_check.NUM_PROMPTS).to_pylist()
    plan = Plan("policy", STAGE_VERSION, "policy", None, names, {}, ids)
    staging = Staging(run, plan, 0)
    found = weight_check.weight_check_of(run.start["policy"], rows, chat_of(run.config.prompts, run.imports))
    record = staging.write_bytes("", weight_check.FILE, found.encode())
    paths = {part: str(path) for part, path in run.start.items()}
    staging.commit(Product(ids, [record], paths))


def normalise(run: ActiveRun, plan: Plan, max_new_tokens: int, expected: str | None = None) -> None:
    """Write prompts that leave room for max_new_tokens in the model's context."""
    context = context_length(load_config(run.start["policy"]))
    tokenizer = load_tokenizer(run.start["policy"])
    room = None if context is None else context - max_new_tokens
    if room is not None and room < 1:
        key = "generate" if plan.output == prompts.OUTPUT else "evaluate"
        raise UsageError(
            f"{key}.max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's context of"
            f" {context} tokens"
        )

    chat = chat_of(prompts.config_of(run, plan.output), run.imports)

    def num_tokens(rows: list[Row]) -> list[int]:
        return [len(ids) for ids in encode(rows, tokenizer, chat)[1]]

    prompts.prepare(run, Staging(run, plan, 0), num_tokens, room, expected)
