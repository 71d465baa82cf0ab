"""verify: every hash, every schema and every invariant of a run, and what to do where one does not hold.

Reads everything and changes nothing, unless asked to move what is damaged to .trash, so that the commands
that make it can be run again.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo import sql, tables
from grpo.artifacts import STAGE_OUTPUTS, FileRecord, Manifest, Run, discard, open_run, pruned_files
from grpo.console import stdout_console
from grpo.errors import CorruptError, GrpoError
from grpo.runner import states

_INVARIANTS = Path(__file__).with_name("invariants.sql")


@dataclass(frozen=True)
class Damage:
    """An output that is not what was committed. iteration None: of the whole run."""

    output: str
    iteration: int | None
    found: str

    @property
    def redo(self) -> str:
        """The command that makes it again once it is out of the way."""
        if self.iteration is None:
            return "grpo run"
        return f"grpo {STAGE_OUTPUTS[self.output]} --iteration {self.iteration}"


@dataclass
class Report:
    """What was looked at, and what was found."""

    counts: Counter[str] = field(default_factory=Counter)
    """files, bytes, rows, outputs; pruned: files that retention dropped."""
    damages: list[Damage] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    """Invariant -> rows that break it; only looked at where nothing is damaged."""
    stale: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or 6 where something is damaged."""
        return CorruptError.exit_code if self.damages or self.broken else 0

    def describe(self) -> dict[str, Any]:
        """The report as plain data."""
        damages = [{**vars(damage), "redo": damage.redo} for damage in self.damages]
        counts = {name: self.counts[name] for name in ("outputs", "files", "bytes", "rows", "pruned")}
        return {
            **counts,
            "damaged": damages,
            "broken": self.broken,
            "stale": self.stale,
            "exit": self.exit_code,
        }


def verify(run: Run) -> Report:
    """Look at every committed output of `run`. Raises UsageError when there is no such run."""
    report = Report()
    _check_run_json(run, report)
    places: list[tuple[str, int | None]] = [("prompts", None), ("policy", None)]
    places += [(output, iteration) for iteration in run.iterations() for output in STAGE_OUTPUTS]
    with run.console.progress("verify", len(places), "outputs") as advance:
        for output, iteration in places:
            run.console.stop_requested()
            _check_output(run, output, iteration, report)
            advance(1)
    if not report.damages:
        rows = sql.read([run], _INVARIANTS.read_text()).to_pylist()
        report.broken = {row["invariant"]: row["rows"] for row in rows}
        report.stale = [
            f"{name} of iteration {iteration}: {state.why}"
            for iteration, by_stage in states(run).items()
            for name, state in by_stage.items()
            if state.name == "stale"
        ]
    return report


def discard_damaged(run: Run, report: Report) -> None:
    """Move what is damaged to .trash. Needs the lock."""
    for damage in report.damages:
        place = run.path / damage.output if damage.output == "run.json" else None
        discard(run, place or run.folder(damage.output, damage.iteration))


def print_report(run: Run, report: Report, discarded: bool) -> None:
    """The report as a person reads it. discarded: what is damaged is in .trash already."""
    out = stdout_console()
    counts = report.counts
    for damage in report.damages:
        out.print(f"damaged  {damage.found}", markup=False, highlight=False, soft_wrap=True)
    for invariant, rows in report.broken.items():
        out.print(f"broken   {invariant}: {rows} rows", markup=False, highlight=False, soft_wrap=True)
    for text in report.stale:
        out.print(f"stale    {text}", markup=False, highlight=False, soft_wrap=True)
    pruned = f", {counts['pruned']:,} pruned" if counts["pruned"] else ""
    size = f"{counts['bytes'] / 2**20:,.1f} MiB"
    out.print(
        f"run {run.name}: {counts['outputs']:,} outputs, {counts['files']:,} files ({size}) and"
        f" {counts['rows']:,} rows read{pruned}; {len(report.damages)} damaged, {len(report.broken)} broken,"
        f" {len(report.stale)} stale",
        highlight=False,
        soft_wrap=True,
    )
    if report.damages:
        redo = list(dict.fromkeys(damage.redo for damage in report.damages))
        first = "moved to .trash" if discarded else "`grpo verify --discard` moves it to .trash"
        out.print(f"{first}; what makes it again: {'; '.join(redo)}", highlight=False, soft_wrap=True)


def _check_run_json(run: Run, report: Report) -> None:
    try:
        open_run(run.name, run.root)
    except CorruptError as error:
        report.damages.append(Damage("run.json", None, str(error)))


def _check_output(run: Run, output: str, iteration: int | None, report: Report) -> None:
    """Add what is wrong with one output: the first thing that is, since all of it is made again together."""
    with suppress(GrpoError):
        report.counts += _look_at(run, output, iteration)
        return
    try:  # once more: a writer may have replaced or pruned it meanwhile
        report.counts += _look_at(run, output, iteration)
    except GrpoError as error:
        report.damages.append(Damage(output, iteration, str(error)))


def _look_at(run: Run, output: str, iteration: int | None) -> "Counter[str]":
    """Counts of one output, all of which is as it should be; else raises what is wrong with it."""
    counts: Counter[str] = Counter()
    manifest = run.manifest(output, iteration)
    if manifest is None:
        return counts
    gone = _pruned(run, output, iteration)
    for file in manifest.files:
        if (file.part, file.name) in gone:
            counts["pruned"] += 1
            continue
        _check_file(run, manifest, file, run.path_of(file, output, iteration))
        counts.update(files=1, bytes=file.bytes, rows=file.rows or 0)
    counts["outputs"] += 1
    return counts


def _pruned(run: Run, output: str, iteration: int | None) -> set[tuple[str, str]]:
    if output != "update" or iteration is None or run.has_checkpoint(iteration):
        return set()
    return {(file.part, file.name) for file in pruned_files(run, iteration)}


def _check_file(run: Run, manifest: Manifest, file: FileRecord, path: Path) -> None:
    run.verify(file, path)
    if file.table is None:
        return
    found = tables.decode(file.table, [(path, path.read_bytes())])
    if len(found) != file.rows:
        raise CorruptError(f"{path}: {len(found)} rows, but its manifest says {file.rows}")
    if "iteration" in found.column_names and set(found["iteration"].unique().to_pylist()) - {
        manifest.iteration
    }:
        raise CorruptError(f"{path}: holds rows of another iteration than {manifest.iteration}")
