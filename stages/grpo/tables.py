"""tables: one pyarrow schema per table, and the way a table becomes bytes.

Key of every rollout-level table: (iteration, group_id, sample_id). Lists are ragged, never padded. Times
never stand in a table: they would make equal results differ.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo.errors import CorruptError, first_line

KEY = ("iteration", "group_id", "sample_id")


def key_text(row: Mapping[str, Any]) -> str:
    """The key of a row for a message: `(iteration, group_id, sample_id) (0, 3, 1)`."""
    return f"({', '.join(KEY)}) {tuple(row[name] for name in KEY)}"


# Column name -> (type, description with unit and range). The order is the order on disk.
Columns = dict[str, tuple[pa.DataType, str]]

_KEY_COLUMNS: Columns = {
    "iteration": (pa.int32(), "iteration that sampled the rollout, from 0"),
    "group_id": (pa.int32(), "draw of the iteration, from 0; a prompt may be drawn twice"),
    "sample_id": (pa.int32(), "response within the group, 0..K-1"),
}

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPTS: Columns = {
    "prompt_id": (pa.int64(), "row number in the source, from 0"),
    "prompt": (pa.string(), "prompt text; null when the prompt is messages"),
    "messages": (_MESSAGES, "chat messages, with their other fields; null when the prompt is text"),
    "answer": (pa.string(), "reference answer, or null"),
}

ROLLOUTS: Columns = {
    **_KEY_COLUMNS,
    "prompt_id": (pa.int64(), "row of `prompts`"),
    "round": (pa.int32(), "resampling round, 0 for the first draw"),
    "prompt": (pa.string(), "the text the model saw, chat template applied"),
    "response": (pa.string(), "response text without special tokens"),
    "prompt_token_ids": (pa.list_(pa.int32()), "the tokens the model saw"),
    "response_token_ids": (pa.list_(pa.int32()), "sampled tokens, the end-of-sequence token included"),
    "old_logprobs": (pa.list_(pa.float32()), "log pi_old per response token, after temperature; <= 0"),
    "response_mask": (pa.list_(pa.bool_()), "true where the policy sampled the token"),
    "finish_reason": (pa.string(), "stop (end of sequence), length (max_new_tokens) or abort"),
    "response_tokens": (pa.int32(), "number of response tokens; 0 for an empty response"),
    "policy_iteration": (pa.int32(), "policy that sampled the rollout"),
    "temperature": (pa.float64(), "sampling temperature, > 0"),
    "seed": (pa.int64(), "63-bit seed of this sample"),
}

REWARDS: Columns = {
    **_KEY_COLUMNS,
    "name": (pa.string(), "name of the reward"),
    "value": (pa.float64(), "what the reward gave; null unless status is ok"),
    "weight": (pa.float64(), "weight in the sum; 0 is stored and changes nothing"),
    "status": (pa.string(), "ok, error, timeout, nonfinite or not_applicable"),
    "error": (pa.string(), "what went wrong, one line; null when nothing did; of ok, why on_timeout counts"),
}

JUDGEMENTS: Columns = {
    **_KEY_COLUMNS,
    "name": (pa.string(), "name of the reward"),
    "status": (pa.string(), "ok (an answer came), error or timeout"),
    "answer": (pa.string(), "what the judge wrote; null unless status is ok"),
    "error": (pa.string(), "why no answer came, one line; null when one did"),
    "model": (pa.string(), "the model that answered, as the endpoint names it"),
    "finish_reason": (pa.string(), "why the answer ends, as the endpoint says it: stop, length, ..."),
    "prompt_tokens": (pa.int32(), "tokens of the question, by the endpoint's count; null where it has none"),
    "answer_tokens": (pa.int32(), "the same of the answer"),
    "attempts": (pa.int32(), "requests that this answer took, from 1"),
}

TEACHER_LOGPROBS: Columns = {
    **_KEY_COLUMNS,
    "name": (pa.string(), "name of the teacher"),
    "logprobs": (
        pa.list_(pa.float32()),
        "the teacher's log-prob per response token at the row's temperature; 0 where response_mask is false",
    ),
    "gap": (pa.float64(), "mean of logprobs - old_logprobs over the tokens that count, in nats"),
}

ADVANTAGES: Columns = {
    **_KEY_COLUMNS,
    "reward": (pa.float64(), "weighted sum of the rewards; null when unscored"),
    "group_mean": (pa.float64(), "mean reward over the scored rollouts of the group"),
    "group_std": (pa.float64(), "sample standard deviation (n-1) of the same"),
    "group_size": (pa.int32(), "scored rollouts of the group"),
    "advantage": (pa.float64(), "group-relative advantage; null where not kept"),
    "keep": (pa.bool_(), "true: update trains on the row"),
    "reason": (
        pa.string(),
        "null when kept, else the first that holds of: empty, unscored, group_too_small, zero_variance,"
        " truncated, stale, filtered",
    ),
}

UPDATES: Columns = {
    "iteration": (pa.int32(), "iteration of the update, from 0"),
    "epoch": (pa.int32(), "pass over the kept rollouts, from 0"),
    "step": (pa.int32(), "optimiser step within the iteration, from 0"),
    "loss": (pa.float64(), "policy_loss + kl_coefficient * kl - entropy_coefficient * aggregated entropy"),
    "policy_loss": (pa.float64(), "minus the aggregated surrogate"),
    "kl": (
        pa.float64(),
        "aggregated KL estimate to the reference, as it enters the loss; null without a KL term",
    ),
    "entropy": (pa.float64(), "mean entropy per response token, in nats"),
    "ratio_mean": (pa.float64(), "mean importance ratio (per token, or per rollout for sequence ratios)"),
    "ratio_max": (pa.float64(), "largest importance ratio"),
    "clip_fraction_low": (
        pa.float64(),
        "share of ratios below 1 - clip_low whose advantage is negative; cispo: of either sign",
    ),
    "clip_fraction_high": (
        pa.float64(),
        "the same above 1 + clip_high, positive; or above delta, not 0; cispo: of either sign",
    ),
    "grad_norm": (pa.float64(), "norm of the gradient before clipping"),
    "learning_rate": (pa.float64(), "learning rate of the step"),
    "rollouts": (pa.int32(), "kept rollouts of the step (N of the denominators)"),
    "tokens": (pa.int64(), "response tokens of the step (sum T_i)"),
    "skipped": (pa.bool_(), "true: nothing to learn from, the optimiser did not step"),
    "mismatch_mean": (
        pa.float64(),
        "mean |policy_logprobs - old_logprobs|; first step taken only, and of this iteration's rollouts",
    ),
    "mismatch_max": (pa.float64(), "largest of the same; first step taken only"),
    "mismatch_kl": (pa.float64(), "k3 estimate of KL(old || policy); first step taken only"),
    "effective_sample_size": (
        pa.float64(),
        "(sum w)^2 / sum w^2 over tokens, as a share; first step taken only",
    ),
    "over_cap_fraction": (
        pa.float64(),
        "share of tokens with w over sampler_correction_cap (2 where it is not for tokens); first step only",
    ),
    "off_policy_fraction": (
        pa.float64(),
        "share of the rollouts read that off_policy_mask left out; null without it",
    ),
    "low_entropy_fraction": (
        pa.float64(),
        "share of the tokens read that top_entropy left out; null without it",
    ),
    "entropy_coefficient": (
        pa.float64(),
        "weight of the entropy under entropy_target: applied where the entropy of the step before was at most"
        " that, else 0 is; null without it",
    ),
}

LOGPROBS: Columns = {
    **_KEY_COLUMNS,
    "update_iteration": (pa.int32(), "iteration of the update that read the rollout"),
    "step": (pa.int32(), "optimiser step that first read it"),
    "policy_logprobs": (pa.list_(pa.float32()), "the learner's own, when it first read the rollout"),
    "reference_logprobs": (pa.list_(pa.float32()), "of the reference; null without a KL term"),
    "mismatch": (
        pa.float64(),
        "mean |policy_logprobs - old_logprobs| over the response; of a later step, or an older iteration,"
        " with what training moved",
    ),
}

_MEASURED: Columns = {
    "iteration": (
        pa.int32(),
        "policy measured: 0 is the starting one, i + 1 what update wrote in iteration i",
    ),
    "group_id": (pa.int32(), "row of `eval_prompts`, from 0: every policy answers the same prompts"),
}
EVAL_ROLLOUTS: Columns = {
    **ROLLOUTS,
    **_MEASURED,
    "prompt_id": (pa.int64(), "row of `eval_prompts`"),
    "round": (pa.int32(), "always 0"),
    "old_logprobs": (pa.list_(pa.float32()), "log-prob per response token, after temperature (greedy: at 1)"),
    "policy_iteration": (pa.int32(), "policy measured, as `iteration`"),
    "temperature": (pa.float64(), "sampling temperature; 0: greedy"),
    "seed": (pa.int64(), "63-bit seed of this sample, the same for every policy and never one of training"),
}

TABLES: dict[str, Columns] = {
    "prompts": PROMPTS,
    "rollouts": ROLLOUTS,
    "rewards": REWARDS,
    "judgements": JUDGEMENTS,
    "teacher_logprobs": TEACHER_LOGPROBS,
    "advantages": ADVANTAGES,
    "updates": UPDATES,
    "logprobs": LOGPROBS,
    "eval_prompts": PROMPTS,
    "eval_rollouts": EVAL_ROLLOUTS,
    "eval_rewards": {**REWARDS, **_MEASURED},
    "eval_judgements": {**JUDGEMENTS, **_MEASURED},
}
# Columns that a file lacks where the key that fills them is not set; whoever reads sees null.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "updates": ("off_policy_fraction", "low_entropy_fraction", "entropy_coefficient")
}
WITH_OWN_COLUMNS = ("prompts", "eval_prompts")  # the user's data set may have more
RENDERED = "rendered_prompt"
"""Further column of those two where a prompt is messages: what the chat template made of them."""


def schema(table: str, without: Collection[str] = ()) -> pa.Schema:
    """The exact Arrow schema of `table` (of prompts: its fixed columns; the user's own follow them).

    without: those of OPTIONAL that a file does not have.
    """
    columns = [(name, kind) for name, (kind, _) in TABLES[table].items() if name not in without]
    return pa.schema(columns)


def encode(data: pa.Table) -> bytes:
    """One Parquet file with one row group per million rows. The same rows give the same bytes."""
    scalars = [field.name for field in data.schema if not pa.types.is_nested(field.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        data,
        sink,
        row_group_size=2**20,
        compression="zstd",
        compression_level=3,
        use_dictionary=scalars,  # token ids and log-probs do not repeat: a dictionary makes them larger
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def decode(table: str, files: Iterable[tuple[Path, bytes]], columns: list[str] | None = None) -> pa.Table:
    """The rows of Parquet `files` (path for messages, content), in order; only `columns` when given.

    Raises CorruptError when a file is no Parquet file or its schema is not that of `table`.
    """
    parts = []
    for path, content in files:
        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            found, part = file.schema_arrow, file.read(columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptError(f"{path}: cannot be read as Parquet: {first_line(error)}") from error
        check_schema(table, found, path)
        for name in set(OPTIONAL.get(table, ())) - set(part.column_names):
            part = part.append_column(name, pa.nulls(len(part), TABLES[table][name][0]))
        names = schema(table).names if columns is None and table in OPTIONAL else columns
        parts.append(part if names is None else part.select(names))
    if not parts:
        return schema(table).empty_table().select(columns or schema(table).names)
    return pa.concat_tables(parts)


def check_schema(table: str, found: pa.Schema, path: Path) -> None:
    """Raise CorruptError unless `found` is the schema of `table` (prompts may have more columns).

    One of OPTIONAL may be missing.
    """
    expected = schema(table, without=set(OPTIONAL.get(table, ())) - set(found.names))
    own = found.names[len(expected) :]
    fixed = pa.schema(list(found)[: len(expected)])
    if table in WITH_OWN_COLUMNS:
        fixed = _with_usual_messages(fixed)
    if not fixed.equals(expected) or (own and table not in WITH_OWN_COLUMNS):
        wrong = [field.name for field in expected if field not in list(found)] or own
        raise CorruptError(f"{path}: schema is not that of table {table}: see column {wrong[0]}")


def _with_usual_messages(found: pa.Schema) -> pa.Schema:
    """The schema without the fields of messages that follow role and content: the user's own."""
    place = found.get_field_index("messages")
    if place < 0 or not pa.types.is_list(found.field(place).type):
        return found
    message = found.field(place).type.value_type
    usual = list(message)[:2] if pa.types.is_struct(message) else []
    return found.set(place, pa.field("messages", pa.list_(pa.struct(usual))))


def is_number(kind: pa.DataType) -> bool:
    """Whether a column's type is one of numbers; truth values are none."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
