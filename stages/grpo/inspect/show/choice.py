"""show.choice: which rollouts are meant: of which iteration, which groups in which order, which page."""

from dataclasses import dataclass
from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun, Run
from grpo.errors import UsageError

Row = dict[str, Any]
SORTS = ("reward", "advantage", "tokens", "mismatch", "spread")

# The user's condition stands in the text of the query: the connection reads, and can do nothing else.
_MATCHING = "select distinct group_id from samples where ({where}) and coalesce(prompt_id = $prompt, true)"


@dataclass(frozen=True)
class Choice:
    """The options of `grpo show` that say which rollouts; None and "" where one was not given."""

    iteration: int | None = None
    where: str | None = None
    prompt: int | None = None
    group: int | None = None
    sample: int | None = None
    sort: str = ""
    reverse: bool = False
    groups: int = 3
    page: int = 1


@dataclass(frozen=True)
class Page:
    """What is shown of `total` things: those from `first`, counted from 1, to `last`."""

    first: int
    last: int
    total: int
    page: int
    noun: str

    def footer(self) -> str:
        """Where one is, and what shows more; empty when that is all."""
        if self.last - self.first + 1 == self.total:
            return ""
        more = f"; --page {self.page + 1}" if self.last < self.total else ""
        where = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{self.noun} {where} of {self.total}{more}"


def turned(items: list[Any], choice: Choice, noun: str = "groups") -> tuple[list[Any], Page]:
    """The items of a page. Raises UsageError (exit 2) for a page after the last."""
    pages = max(1, -(-len(items) // choice.groups))
    if choice.page > pages:
        size = f"{len(items)} {noun} are {pages} page{'s' if pages > 1 else ''} of {choice.groups}"
        raise UsageError(f"--page {choice.page}: {size}")
    begin = (choice.page - 1) * choice.groups
    shown = items[begin : begin + choice.groups]
    return shown, Page(begin + 1, begin + len(shown), len(items), choice.page, noun)


def chosen_iteration(run: Run, iteration: int | None, asked: str = "") -> int:
    """The iteration asked for, else the newest. Raises UsageError (exit 2) where it has no rollouts.

    asked: the option that names it, with its value; else --iteration.
    """
    have = [number for number in run.iterations() if run.manifest("rollouts", number)]
    if not have:
        raise UsageError(f"run {run.name}: holds no rollouts yet")
    chosen = have[-1] if iteration is None else iteration
    if chosen not in have:
        there = f"{have[0]} to {have[-1]}" if not asked else f"{have[0]} to {have[-1]}, not of {chosen}"
        raise UsageError(f"{asked or f'--iteration {chosen}'}: run {run.name} has rollouts of {there}")
    return chosen


def ordered(run: ActiveRun, iteration: int, choice: Choice) -> dict[int, list[int]]:
    """Groups that have a rollout that meets the choice -> their samples, both in the order to read them.

    Raises UsageError (exit 2) for a condition that DuckDB refuses, and for what nothing can be sorted by.
    """
    _check_sort(run, iteration, choice)
    statement = _MATCHING.format(where=choice.where or "true")
    try:
        found = sql.read([run], statement, {"prompt": choice.prompt}, iteration)
    except UsageError as error:
        if choice.where is None:
            raise
        what = str(error).removeprefix("query: ").partition(" LINE 1:")[0]  # behind it is our own query
        raise UsageError(f"--where {choice.where}: {what}") from None
    matching = set(found["group_id"].to_pylist())
    rows = sql.read([run], sql.own_text("inspect/show/keys"), {"sort": choice.sort}, iteration).to_pylist()
    rows = [row for row in rows if row["group_id"] in matching]
    for name, wanted, noun in (("group_id", choice.group, "group"), ("sample_id", choice.sample, "sample")):
        if wanted is not None:
            kept = [row for row in rows if row[name] == wanted]
            if not kept:
                raise UsageError(f"--{noun} {wanted}: {_not_there(rows, name, noun, iteration)}")
            rows = kept
    sign = 1 if choice.reverse else -1
    rows.sort(
        key=lambda row: (row["key"] is None, sign * (row["key"] or 0), row["group_id"], row["sample_id"])
    )
    order: dict[int, list[int]] = {}
    for row in rows:  # a group stands where the first of its samples does
        order.setdefault(row["group_id"], []).append(row["sample_id"])
    return order


def fetch(run: ActiveRun, iteration: int, order: dict[int, list[int]]) -> list[Row]:
    """Rows of `samples` of these groups and samples of an iteration, in this order."""
    found = sql.read([run], sql.own_text("inspect/show/rows"), {"groups": list(order)}, iteration)
    rows = {(row["group_id"], row["sample_id"]): row for row in found.to_pylist(maps_as_pydicts="strict")}
    return [rows[group, sample] for group, samples in order.items() for sample in samples]


def rewards_of(run: Run, iteration: int) -> list[str]:
    """Names of the rewards of an iteration; none before it is scored."""
    manifest = run.manifest("rewards", iteration)
    return sorted(name.removeprefix("reward/") for name in manifest.ids) if manifest else []


def _check_sort(run: Run, iteration: int, choice: Choice) -> None:
    known = [*SORTS, *rewards_of(run, iteration)]
    if choice.reverse and not choice.sort:
        raise UsageError("--reverse: turns the order of --sort; give both")
    if choice.sort and choice.sort not in known:
        raise UsageError(f"--sort {choice.sort}: expected one of {', '.join(dict.fromkeys(known))}")


def _not_there(rows: list[Row], name: str, noun: str, iteration: int) -> str:
    have = sorted({row[name] for row in rows})
    if not have:
        return "no rollout meets the condition"
    return f"iteration {iteration} has {noun}s {have[0]} to {have[-1]}"
