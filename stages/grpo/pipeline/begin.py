"""begin: what a run commits once, and loads models for: its prompts, and the ids of what it starts from."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from grpo.artifacts import ActiveRun, Plan, Product, Staging
from grpo.errors import InputError, UsageError
from grpo.models import weight_check
from grpo.models.loading import context_length, load_config, load_model, load_tokenizer
from grpo.prompts import table as prompts
from grpo.prompts.chat import chat_of
from grpo.prompts.oddities import Oddities
from grpo.prompts.rendering import Encoder
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
    """Write prompts, or held-out ones, that leave room for max_new_tokens, and say what is odd about them."""
    policy = run.start["policy"]
    room, id_ = room_of(run, policy, plan.output), run.checkpoint_id(str(policy.absolute()))
    notes: list[str] = []
    key = "prompts" if plan.output == prompts.OUTPUT else "evaluate.prompts"
    with closing(Look(run, policy, plan.output)) as look:
        staging = Staging(run, plan, 0)
        try:
            prompts.prepare(run, staging, look.num_tokens, room, expected, look.render, notes, id_)
        except InputError:
            if expected is None:
                raise
            # The run may be of before texts were kept; what it holds is then known without them.
            prompts.prepare(run, staging, look.num_tokens, room, expected, policy=id_)
        for line in look.lines(notes):
            run.console.say(f"{key}: {line}")


class Look:
    """Prompts as a policy sees them, and what is odd about those that were read; to be closed.

    policy: its folder; None where it is not there yet, and then chats stay as they are.
    """

    def __init__(self, run: ActiveRun, policy: Path | None, output: str) -> None:
        self._oddities = Oddities()
        self._encoder: Encoder | None = None
        if policy is not None:
            chat = chat_of(prompts.config_of(run, output), run.imports)
            self._encoder = Encoder(load_tokenizer(policy), chat, run.console.stop_requested)

    def render(self, rows: list[Row]) -> list[Row]:
        """The rows, each with its text; they are looked at."""
        found = rows if self._encoder is None else self._encoder.rows(rows)
        self._oddities.add(found)
        return found

    def num_tokens(self, rows: list[Row]) -> Iterator[int]:
        """Of each row."""
        assert self._encoder is not None, "there is no policy whose tokens could be counted"
        return self._encoder.num_tokens(self._encoder.rows(rows))

    def lines(self, notes: list[str]) -> list[str]:
        """What is odd, behind what normalised() noted: a line each."""
        return [*notes, *self._oddities.lines(self._encoder)]

    def close(self) -> None:
        """End the process that renders."""
        if self._encoder is not None:
            self._encoder.close()


def room_of(run: ActiveRun, policy: Path, output: str) -> int | None:
    """The most tokens of a prompt that leave room for a response in the context of `policy`; None: any.

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
    return None if context is None else context - limit
