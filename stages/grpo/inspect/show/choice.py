"""show.choice: which rollouts are meant: of which iteration, which groups in which order, and their rows."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, TypeVar

import pyarrow as pa

from grpo import sql
from grpo.artifacts import ActiveRun, Run
from grpo.errors import InputError, ResourceError, UsageError
from grpo.models.tokenizer import FILE, pieces, starting_policy, tokenizer_of

Row = dict[str, Any]
Draw = list[Row]  # the rollouts of one group
Opened = Callable[[str], ActiveRun]  # opens a run by its name
EVERY = 2**31 - 1  # above any iteration
SORTS = ("reward", "advantage", "tokens", "mismatch", "spread")
_NONE = "no rollout meets the condition"
_GROUPS = (
    "distinct group_id",
    "(select * from samples where coalesce(prompt_id = $prompt, true)) as samples",
)
# [0-9]: int() refuses ², which is a digit, and thousands of digits.
_MOMENT = re.compile("(?P<own>[0-9]{1,9})|(?P<name>[^:]+)(:(?P<at>[0-9]{1,9}))?")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Options:
    """The options of `grpo show`; None, "" and () where one was not given."""

    iteration: int | None = None
    where: str | None = None
    prompt: int | None = None
    group: int | None = None
    sample: int | None = None
    sort: str = ""
    reverse: bool = False
    groups: int = 3
    page: int = 1
    reward: tuple[str, ...] = ()
    side_by_side: bool = False
    tokens: bool = False
    against: str = ""
    pager: bool = True
    as_json: bool = False
    timeout_s: float = sql.TIMEOUT_S


def turned(items: list[_Item], options: Options, noun: str) -> tuple[list[_Item], str]:
    """The items of a page, and in words where that is. Raises UsageError (exit 2) for one after the last."""
    total, size, page = len(items), options.groups, options.page
    pages = [items[first : first + size] for first in range(0, total, size)] or [items]
    if page > len(pages):
        many = f"{len(pages)} page{'s' if len(pages) > 1 else ''} of {size}"
        raise UsageError(f"--page {page}: {total} {noun} are {many}")
    shown, last = pages[page - 1], min(page * size, total)
    if len(pages) == 1:
        return shown, "" if items else _NONE
    where = last if len(shown) == 1 else f"{last - len(shown) + 1}-{last}"
    return shown, f"{noun} {where} of {total}{f'; --page {page + 1}' if page < len(pages) else ''}"


def sampled(run: Run) -> list[int]:
    """Iterations that have rollouts, in order."""
    return [number for number in run.iterations() if run.manifest("rollouts", number)]


def chosen_iteration(run: Run, iteration: int | None) -> int:
    """The iteration asked for, else the newest. UsageError (exit 2) for one without rollouts."""
    chosen = max(sampled(run), default=0) if iteration is None else iteration
    check_sampled(run, chosen, chosen, f"--iteration {chosen}")
    return chosen


def check_sampled(run: Run, first: int, last: int, option: str) -> None:
    """Raise UsageError (exit 2), naming the option, where a run lacks rollouts of one of these iterations.

    last: EVERY asks for what is there.
    """
    have = sampled(run)
    if not have:
        raise UsageError(f"run {run.name}: holds no rollouts yet")
    if last != EVERY and not {first, last} <= {*have}:
        raise UsageError(f"{option}: run {run.name} has rollouts of {range_text(have)}")


def range_text(numbers: list[int]) -> str:
    """`0 to 13`: the first and the last."""
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


def rewards_of(run: Run, iteration: int) -> tuple[str, ...]:
    """Names of the rewards of an iteration; none before it is scored."""
    manifest = run.manifest("rewards", iteration)
    return tuple(sorted(name.removeprefix("reward/") for name in manifest.ids)) if manifest else ()


def ordered(run: ActiveRun, iteration: int, options: Options) -> list[tuple[int, list[int]]]:
    """Groups that have a rollout that meets the options, and their samples, both in the order to read them.

    Raises UsageError (exit 2) for a condition that DuckDB refuses, and for what nothing can be sorted by.
    """
    known = dict.fromkeys([*SORTS, *rewards_of(run, iteration)])
    if options.reverse and not options.sort:
        raise UsageError("--reverse: turns the order of --sort; give both")
    if options.sort and options.sort not in known:
        raise UsageError(f"--sort {options.sort}: expected one of {', '.join(known)}")
    if options.where is None:
        if options.timeout_s != sql.TIMEOUT_S:
            raise UsageError("--timeout-s: is of the query that --where makes; give both")
        every = "select {} from {}".format(*_GROUPS)
        matching = sql.read([run], every, {"prompt": options.prompt}, iteration)
    else:
        matching = _meeting(run, iteration, options.where, options.prompt, options.timeout_s)
    by = {"sort": options.sort, "sign": 1 if options.reverse else -1}
    values = {"groups": matching["group_id"].to_pylist(), **by}
    rows = sql.read([run], sql.own_text("inspect/show/keys"), values, iteration).to_pylist()
    for name, wanted in (("group", options.group), ("sample", options.sample)):
        have = sorted({row[f"{name}_id"] for row in rows})
        if wanted is not None and wanted not in have:
            there = f"iteration {iteration} has {name}s {range_text(have)}" if have else _NONE
            raise UsageError(f"--{name} {wanted}: {there}")
        rows = [row for row in rows if wanted in (None, row[f"{name}_id"])]
    order: dict[int, list[int]] = {}
    for row in rows:  # a group stands where the first of its samples does
        order.setdefault(row["group_id"], []).append(row["sample_id"])
    return list(order.items())


def _meeting(run: ActiveRun, iteration: int, where: str, prompt: int | None, timeout_s: float) -> pa.Table:
    """`group_id` of the groups with a rollout that meets the user's condition."""
    question = sql.Question(where, [run], iteration, parameters={"prompt": prompt}, condition_of=_GROUPS)
    try:
        with sql.UserSql() as user_sql:
            return user_sql.rows(question, timeout_s=timeout_s).table()
    except (UsageError, ResourceError) as error:
        raise type(error)(f"--where {where}: {str(error).removeprefix('query: ')}") from None


def draws_of(run: ActiveRun, iteration: int, order: list[tuple[int, list[int]]]) -> list[Draw]:
    """Rows of `samples` of these groups and samples of an iteration, in this order."""
    groups = {"groups": [group for group, _ in order]}
    found = sql.read([run], sql.own_text("inspect/show/rows"), groups, iteration)
    rows = {(row["group_id"], row["sample_id"]): row for row in found.to_pylist(maps_as_pydicts="strict")}
    return [[rows[group, sample] for sample in samples] for group, samples in order]


def add_tokens(run: ActiveRun, iteration: int, draws: list[Draw]) -> None:
    """Give each row its `tokens`: of each its text, id, old_logprob, and policy_logprob or null.

    Raises InputError (exit 4) when no policy of the run has a tokenizer that says what a token is.
    """
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        path = (starting_policy(run) or run.path) / FILE
        raise InputError(f"{path}: missing, and no policy of run {run.name} has one; --tokens needs it")
    groups = {"groups": [draw[0]["group_id"] for draw in draws]}
    found = sql.read([run], sql.own_text("inspect/show/tokens"), groups, iteration).to_pylist()
    tokens_of = {(row["group_id"], row["sample_id"]): row["tokens"] for row in found}
    for row in chain.from_iterable(draws):
        tokens = tokens_of[row["group_id"], row["sample_id"]]
        texts = pieces(tokenizer, [token["token_id"] for token in tokens])
        row["tokens"] = [{"text": text, **token} for text, token in zip(texts, tokens, strict=True)]


def every_draw_of(run: ActiveRun, prompt: int) -> list[Draw]:
    """Every group that drew a prompt, earliest first. Raises UsageError (exit 2) where there is none."""
    found = sql.read([run], sql.own_text("inspect/show/draws"), {"prompt_id": prompt})
    rows = found.to_pylist(maps_as_pydicts="strict")
    if not rows:
        manifest = run.manifest("prompts", None)
        known = manifest.rows if manifest else 0
        why = "was not drawn yet" if 0 <= prompt < known else f"the run has prompts 0 to {known - 1}"
        raise UsageError(f"--prompt {prompt}: {why}")
    return [list(draw) for _, draw in groupby(rows, key=lambda row: (row["iteration"], row["group_id"]))]


def moment(run: ActiveRun, iteration: int, against: str, opened: Opened) -> tuple[ActiveRun, int]:
    """What `--against` names: an iteration `40`, a run at the same one `NAME`, or both `NAME:40`.

    Raises UsageError (exit 2) for anything else, other prompts, and an iteration without rollouts.
    """
    found = _MOMENT.fullmatch(against)
    if not found:
        raise UsageError(f"--against {against}: expected an iteration 40, a run NAME, or NAME:40")
    other, at = opened(found["name"]) if found["name"] else run, int(found["own"] or found["at"] or iteration)
    if run.id_of("prompts") != other.id_of("prompts"):
        raise UsageError(f"--against {against}: {other.name} has other prompts than {run.name}")
    check_sampled(other, at, at, f"--against {other.name}:{at}")
    return other, at


def pairs_of(draws: list[Draw], others: list[Draw]) -> list[tuple[Draw, Draw]]:
    """The first groups of two moments that drew the same prompt, in the order of the first."""
    second = {draw[0]["prompt_id"]: draw for draw in reversed(others)}
    pairs: dict[int, tuple[Draw, Draw]] = {}
    for draw in draws:
        prompt = draw[0]["prompt_id"]
        if prompt in second:
            pairs.setdefault(prompt, (draw, second[prompt]))
    return list(pairs.values())
