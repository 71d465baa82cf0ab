"""compare.previous: `correct@previous`, the values of a reward that an edit in place has replaced."""

import pyarrow as pa

from grpo import tables
from grpo.artifacts import Run, replaced
from grpo.errors import InputError

SUFFIX = "@previous"
_TABLE = "rewards"


def with_previous(run: Run, names: list[str], first: int, last: int) -> pa.Table:
    """The rows of `rewards`, and those that `names`, each with SUFFIX, had before: named so, of weight 0.

    Of each iteration the newest that differ. Raises InputError (exit 4) where nothing of a name is left.
    """
    scored = [n for n in run.iterations() if first <= n <= last and run.manifest(_TABLE, n)]
    parts = {iteration: run.read(_TABLE, iteration) for iteration in scored}
    earlier = []
    for name in names:
        reward = name.removesuffix(SUFFIX)
        found = [rows for n, data in parts.items() if (rows := _before(run, n, reward, data)) is not None]
        if not found:
            raise InputError(
                f"run {run.name}: .trash holds no other values of {reward} for rollouts that are still there;"
                " `grpo score --iteration N --force` leaves them, `grpo gc` removes them; to keep both, give"
                " the new one a name of its own, and weight 0"
            )
        earlier += [_renamed(rows, name) for rows in found]
    return pa.concat_tables([*parts.values(), *earlier])


def _before(run: Run, iteration: int, reward: str, now: pa.Table) -> pa.Table | None:
    values = _of(now, reward)["value"]
    for folder, manifest in replaced(run, _TABLE, iteration):
        held = []
        for file in manifest.files:
            if file.table == _TABLE and file.labels.get("reward") == reward:
                path = folder / file.part / file.name
                run.verify(file, path)
                held.append((path, path.read_bytes()))
        if held and not (rows := _of(tables.decode(_TABLE, held), reward))["value"].equals(values):
            return rows
    return None


def _of(rows: pa.Table, reward: str) -> pa.Table:
    found = rows.filter(pa.array([name == reward for name in rows["name"].to_pylist()], pa.bool_()))
    return found.sort_by([(key, "ascending") for key in tables.KEY])


def _renamed(rows: pa.Table, name: str) -> pa.Table:
    for column, value in (("name", name), ("weight", 0.0)):
        field = rows.schema.field(column)
        constant = pa.array([value] * len(rows), field.type)
        rows = rows.set_column(rows.schema.get_field_index(column), field, constant)
    return rows
