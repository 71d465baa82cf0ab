"""rollouts: the rollouts of a run as columns for the page. B rollouts, N tokens of all of them, P prompts.

Text is stored once, as the bytes of the tokens one after the other, and the tokens as their lengths in it. Of
log-probs and ratios a byte each is kept, in steps that are finest where most of them are.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql
from grpo.artifacts import Run
from grpo.inspect.report.selection import Limits, Selection, choose
from grpo.inspect.report.tokens import bytes_of, special_texts, tokenizer_of

LOGPROB_RANGE = 25.0
"""Nats. A log-prob is -25 (code / 254)^2: in steps of 0.04 at -1, of 0.2 at -25; below all is -25."""
RATIO_RANGE = 4.0
"""Nats. The logarithm of a ratio is +-4 (c / 127)^2, c = |code - 127|: steps of 0.014 at a ratio of 1.2."""
NO_CODE = 255
_BYTES_PER_TOKEN = 4  # of a prompt, which is not stored as tokens

_SIZES = f"""
select
    iteration,
    count(distinct group_id) as groups,
    count(*) as rollouts,
    (
        sum(response_tokens)
        + coalesce(sum(strlen(prompt)) filter (sample_id = 0), 0)
            / {_BYTES_PER_TOKEN}
    )::bigint as tokens,
from memory.main.rollouts
where run = $run
group by iteration
order by iteration
"""

# Whoever reads the page picks rollouts by their place in this order.
_PICKED = """
select
    (row_number() over (order by iteration, group_id, sample_id) - 1)::integer
        as place,
    run,
    iteration,
    group_id,
    sample_id,
    prompt_id,
    finish_reason,
    response_tokens,
from rollouts
where run = $run
    and list_contains($iterations, iteration)
    and group_id < $groups
"""

_SCALARS = f"""
with picked as ({_PICKED})

select picked.*, reward, advantage, keep, reason,
from picked
left join advantages using (run, iteration, group_id, sample_id)
order by place
"""

_REWARDS = f"""
with picked as ({_PICKED})

select place, name, value, weight, status, error,
from rewards
join picked using (run, iteration, group_id, sample_id)
order by name, place
"""

_PROMPTS = f"""
with picked as ({_PICKED}),

shown as (
    select rollouts.prompt_id, min(prompt) as prompt,
    from memory.main.rollouts as rollouts
    join picked using (run, iteration, group_id, sample_id)
    group by rollouts.prompt_id
)

select shown.prompt_id, shown.prompt, answer,
from shown
left join (from prompts where run = $run) as prompts using (prompt_id)
order by shown.prompt_id
"""

# List columns do not fit through a join or a sort: they are put in order here, not there.
_TOKENS = """
select iteration, group_id, sample_id,
    response, response_token_ids, response_mask, old_logprobs,
from memory.main.rollouts
where run = $run
    and list_contains($iterations, iteration)
    and group_id < $groups
"""

_POLICY_LOGPROBS = """
select iteration, group_id, sample_id, policy_logprobs,
from logprobs
where run = $run
    and update_iteration = iteration
    and list_contains($iterations, iteration)
    and group_id < $groups
"""

Block = tuple[dict[str, Any], dict[str, np.ndarray]]


def read(connection: sql.Connection, run: Run, limit: Limits) -> tuple[Block, Selection]:
    """(document, columns) of the chosen rollouts of a run, and what was chosen."""
    chosen = choose(sql.query(connection, _SIZES, {"run": run.name}).to_pylist(), limit)
    values = {
        "run": run.name,
        "iterations": chosen.iterations,
        "groups": 2**31 - 1 if chosen.groups is None else chosen.groups,
    }
    scalars = sql.query(connection, _SCALARS, values)
    prompts = sql.query(connection, _PROMPTS, values)
    document: dict[str, Any] = {
        "rollouts": len(scalars),
        "prompts": prompts["prompt"].to_pylist(),
        "answers": prompts["answer"].to_pylist(),
        "prompt_ids": prompts["prompt_id"].to_pylist(),
    }
    columns = {name: scalars[name].to_numpy() for name in ("iteration", "group_id", "sample_id")}
    columns["prompt"] = np.searchsorted(
        prompts["prompt_id"].to_numpy(), scalars["prompt_id"].to_numpy()
    ).astype(np.uint32)
    for name in ("finish_reason", "reason"):
        document[name], columns[name] = _dictionary(scalars[name])
    columns["reward"] = _floats(scalars["reward"])
    columns["advantage"] = _floats(scalars["advantage"])
    columns["keep"] = scalars["keep"].cast(pa.uint8()).fill_null(NO_CODE).to_numpy()
    document["rewards"], more = _rewards(sql.query(connection, _REWARDS, values), len(scalars))
    tokens, special, problem = _tokens(connection, run, values, scalars)
    document |= {"special": special, "tokens_absent": problem}
    return (document, {**columns, **more, **tokens}), chosen


def _rewards(rows: pa.Table, num_rollouts: int) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Each reward: value and status of every rollout; status of one without a row is null."""
    rewards: list[dict[str, Any]] = []
    columns: dict[str, np.ndarray] = {}
    for index, name in enumerate(pc.unique(rows["name"]).to_pylist()):
        own = rows.filter(pc.equal(rows["name"], name))
        place = own["place"].to_numpy()
        value = np.full(num_rollouts, np.nan, dtype=np.float32)
        value[place] = _floats(own["value"])
        columns[f"value_{index}"] = value
        entry: dict[str, Any] = {"name": name, "weights": pc.unique(own["weight"]).to_pylist()}
        for column in ("status", "error"):
            entry[column], codes = _dictionary(own[column])
            spread = np.full(num_rollouts, NO_CODE if codes.dtype == np.uint8 else 2**32 - 1, codes.dtype)
            spread[place] = codes
            columns[f"{column}_{index}"] = spread
        rewards.append(entry)
    return rewards, columns


def _tokens(
    connection: sql.Connection, run: Run, values: dict[str, Any], scalars: pa.Table
) -> tuple[dict[str, np.ndarray], list[str], str]:
    """Text, tokens, log-probs and ratios; what special tokens read as; why there are no tokens, if so."""
    rows = sql.query(connection, _TOKENS, values).combine_chunks()
    rows = rows.take(_places(rows, scalars))
    lengths_B = scalars["response_tokens"].to_numpy()
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        texts = rows["response"].cast(pa.large_binary()).combine_chunks()
        sizes_B = pc.binary_length(texts).to_numpy().astype(np.uint32)
        columns = {"tokens": np.zeros(len(rows), np.uint32), "bytes": sizes_B, "text": _content(texts)}
        return columns, [], "no tokenizer.json is where the checkpoints of this run were"
    ids_N = _flat(rows["response_token_ids"])
    text, sizes_N = _text(tokenizer, ids_N)
    old_N = _flat(rows["old_logprobs"])
    policy_N = _policy_logprobs(connection, values, scalars, lengths_B)
    masked_N = ~_flat(rows["response_mask"])
    logprob_N, ratio_N = quantised_logprobs(old_N), quantised_ratios(policy_N - old_N)
    logprob_N[masked_N] = NO_CODE
    ratio_N[masked_N] = NO_CODE
    offsets = np.concatenate([[0], np.cumsum(sizes_N, dtype=np.int64)])
    ends_B = np.cumsum(lengths_B, dtype=np.int64)
    columns = {
        "tokens": lengths_B.astype(np.uint32),
        "bytes": (offsets[ends_B] - offsets[ends_B - lengths_B]).astype(np.uint32),
        "text": text,
        "sizes": sizes_N.astype(np.uint8 if sizes_N.max(initial=0) < 256 else np.uint32),
        "logprob": logprob_N,
        "ratio": ratio_N,
    }
    return columns, special_texts(tokenizer), ""


def _text(tokenizer: Any, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all tokens one after the other, and how many each has."""
    present_V = np.zeros(ids_N.max(initial=0) + 1, dtype=bool)
    present_V[ids_N] = True
    used = np.flatnonzero(present_V)
    index_V = np.zeros(len(present_V), dtype=np.int64)
    index_V[used] = np.arange(len(used))
    texts = bytes_of(tokenizer, used).cast(pa.large_binary()).take(pa.array(index_V[ids_N]))
    return _content(texts), pc.binary_length(texts).to_numpy(zero_copy_only=False)


def _policy_logprobs(
    connection: sql.Connection, values: dict[str, Any], scalars: pa.Table, lengths_B: np.ndarray
) -> np.ndarray:
    """The learner's log-probs of every token; NaN for rollouts that no update of their iteration read."""
    rows = sql.query(connection, _POLICY_LOGPROBS, values).combine_chunks()
    places = _places(rows, scalars)
    found_B = np.zeros(len(lengths_B), dtype=bool)
    found_B[places >= 0] = True
    logprobs_N = np.full(lengths_B.sum(), np.nan, dtype=np.float32)
    logprobs_N[np.repeat(found_B, lengths_B)] = _flat(rows["policy_logprobs"].take(places[found_B]))
    return logprobs_N


def _places(rows: pa.Table, scalars: pa.Table) -> np.ndarray:
    """Where the rows of `scalars` are in `rows`, by key; -1 for one that is not there."""
    keys = [table.select(["iteration", "group_id", "sample_id"]) for table in (rows, scalars)]
    columns = [[table[name].to_numpy().astype(np.int64) for name in table.column_names] for table in keys]
    spans = [
        max((int(column.max(initial=0)) for column in pair), default=0) + 1
        for pair in zip(*columns, strict=True)
    ]
    have, wanted = ((c[0] * spans[1] + c[1]) * spans[2] + c[2] for c in columns)
    order = np.argsort(have)
    if not len(have):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(have, wanted, sorter=order), len(have) - 1)
    return np.where(have[order[at]] == wanted, order[at], -1)


def quantised_logprobs(logprobs_N: np.ndarray) -> np.ndarray:
    """A byte for each log-prob, see LOGPROB_RANGE; NO_CODE for NaN."""
    return _coded(np.sqrt(np.clip(-logprobs_N, 0, LOGPROB_RANGE) / LOGPROB_RANGE) * 254)


def quantised_ratios(differences_N: np.ndarray) -> np.ndarray:
    """A byte for each ratio exp(difference), see RATIO_RANGE; NO_CODE for NaN."""
    size_N = np.sqrt(np.minimum(np.abs(differences_N), RATIO_RANGE) / RATIO_RANGE) * 127
    return _coded(127 + np.copysign(np.rint(size_N), differences_N))


def _coded(values_N: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values_N), NO_CODE, np.rint(np.nan_to_num(values_N))).astype(np.uint8)


def _dictionary(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The different texts of a column, and which of them each row has; the highest number for null."""
    encoded = column.combine_chunks().dictionary_encode()
    dtype = np.uint8 if len(encoded.dictionary) < NO_CODE else np.uint32
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return encoded.dictionary.to_pylist(), np.where(codes < 0, np.iinfo(dtype).max, codes).astype(dtype)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float32, NaN for null."""
    found: np.ndarray = column.to_numpy().astype(np.float32)
    return found


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """All values of a list column, one row after the other."""
    values: np.ndarray = pc.list_flatten(column).to_numpy()
    return values


def _content(texts: Any) -> np.ndarray:
    """The bytes of a binary array, one value after the other."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    total = pc.sum(pc.binary_length(texts)).as_py() or 0
    return np.frombuffer(texts.buffers()[2] or b"", dtype=np.uint8)[:total]
