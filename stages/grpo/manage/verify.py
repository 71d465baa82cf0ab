"""verify: every hash, every schema and every invariant of a run, and what to do where one does not hold.

Reads everything and changes nothing, unless asked to move what is damaged to .trash, so that the commands
that make it can be run again.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo import sql, tables
from grpo.artifacts import (
    MANIFEST,
    OUTPUTS,
    PRUNED,
    RUN_OUTPUTS,
    ActiveRun,
    FileRecord,
    Manifest,
    Run,
    check_staged,
    discard,
    holder_of,
    open_run,
    staging_folders,
)
from grpo.console import stdout_console
from grpo.errors import CorruptError
from grpo.inspect.track import note_path, read_note
from grpo.manage.repair import Damage, Place, command_for, damage, read_by
from grpo.pipeline.restart import intent_path, read_intent
from grpo.pipeline.states import evaluation_states, states

if TYPE_CHECKING:
    import pyarrow as pa


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
        damages = [{"found": each.found, "redo": each.redo or None} for each in self.damages]
        counts = {name: self.counts[name] for name in ("outputs", "files", "bytes", "rows", "pruned")}
        return {
            **counts,
            "damaged": damages,
            "broken": self.broken,
            "stale": self.stale,
            "exit": self.exit_code,
        }


def verify(run: ActiveRun) -> Report:
    """Look at every committed output of `run`. Raises UsageError when there is no such run."""
    report = Report()
    _check_notes(run, report)
    places: list[Place] = [(output, None) for output in RUN_OUTPUTS]
    numbers = sorted({*run.iterations(), *run.evaluations()})
    places += [(output, iteration) for iteration in numbers for output in OUTPUTS]
    wrong: dict[Place, str] = {}
    readers: dict[Place, Place] = {}
    with run.console.progress("verify", len(places), "outputs") as advance:
        for place in places:
            run.console.stop_requested()
            try:
                manifest = _check_output(run, place, report.counts)
            except CorruptError as error:
                wrong[place] = str(error)
            else:
                for reference in manifest.inputs if manifest else ():
                    readers.setdefault(holder_of(reference), place)
                if manifest is not None and "evaluate.prompts" in manifest.user_files:
                    readers.setdefault(("eval_prompts", None), place)
            advance(1)
    wrong |= _gone(run, readers, wrong)
    report.damages += [damage(run, place, wrong) for place in sorted(wrong, key=_in_order)]
    report.stale = _unfinished(run)
    if not report.damages and not report.stale:
        rows = sql.read([run], sql.own_text("sql/views/invariants")).to_pylist()
        report.broken = {row["invariant"]: row["rows"] for row in rows}
        report.stale = _stale(run)
    return report


def _stale(run: ActiveRun) -> list[str]:
    present = states(run)
    found = [
        (f"{name} of iteration {iteration}", state)
        for iteration, by_stage in present.items()
        for name, state in by_stage.items()
    ]
    evaluated = evaluation_states(run, present)
    found += [(f"evaluation of policy {policy}", state) for policy, state in evaluated.items()]
    return [f"{what}: {state.why}" for what, state in found if state.name == "stale"]


def discard_damaged(run: Run, report: Report) -> None:
    """Move what is damaged and can be made again to .trash. Needs the lock."""
    for each in report.damages:
        if each.aside is not None:
            discard(run, each.aside)


def print_report(run: Run, report: Report, discarded: bool) -> None:
    """The report as a person reads it. discarded: what is damaged is in .trash already."""
    out = stdout_console()
    counts = report.counts
    for each in report.damages:
        out.print(f"damaged  {each.found}", markup=False, highlight=False, soft_wrap=True)
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
    if any(each.aside for each in report.damages):
        first = "moved to .trash" if discarded else "`grpo verify --discard` moves it to .trash"
        first = f"what can be rebuilt: {first}" if not all(each.redo for each in report.damages) else first
        out.print(first, highlight=False, soft_wrap=True)
    if redo := list(dict.fromkeys(each.redo for each in report.damages if each.redo)):
        text = f"to rebuild it, with the configuration of run {run.name}: {'; '.join(redo)}"
        out.print(text, highlight=False, soft_wrap=True)


def _check_notes(run: ActiveRun, report: Report) -> None:
    """What is no output: run.json, the intent of `--from`, the tracker's note, and unfinished work."""
    notes: list[tuple[Path, Callable[[], object]]] = [
        (run.path / "run.json", partial(open_run, run.name, run.root)),
        (intent_path(run), partial(read_intent, run)),
        (note_path(run), partial(read_note, run)),
    ]
    for path, check in notes:
        try:
            check()
        except CorruptError as error:
            report.damages.append(Damage(str(error), "grpo run", path))
    folders = [run.iteration_root(number) for number in {*run.iterations(), *run.evaluations()}]
    for path in (run.trash, run.staging_root(None), *folders):
        if path.exists() and not path.is_dir():
            found = f"{path}: is a file where a folder belongs; remove it"
            report.damages.append(Damage(found, "grpo run"))
    for folder in staging_folders(run):
        try:
            check_staged(run, folder)
        except CorruptError as error:
            if folder.exists():  # else a writer has committed it meanwhile
                report.damages.append(Damage(str(error), _command_of(folder), folder))


def _command_of(staged: Path) -> str:
    """The command that goes on with what is staged in a folder."""
    output = staged.name.rpartition("-")[0]
    iteration = staged.parent.name.removeprefix("iteration=")
    return command_for(output, int(iteration) if iteration.isdecimal() else None)


def _unfinished(run: Run) -> list[str]:
    """What a crash came between, and the next command finishes: until then some outputs look stale."""
    with suppress(CorruptError):  # which is reported already
        if (first := read_intent(run)) is not None:
            return [f"--from {first}: not finished; the next `grpo run` resumes it"]
    return [
        f"{folder}: written, and moved to its place by the next command"
        for folder in staging_folders(run)
        if (folder / MANIFEST).exists()
    ]


def _check_output(run: Run, place: Place, counts: "Counter[str]") -> Manifest | None:
    """Its manifest; raises the first thing that is wrong with it: all of it is made again together."""
    with suppress(CorruptError, FileNotFoundError):
        return _look_at(run, place, counts)
    return _look_at(run, place, counts)  # once more: a writer may have replaced or pruned it meanwhile


def _look_at(run: Run, place: Place, counts: "Counter[str]") -> Manifest | None:
    manifest = run.manifest(*place)
    if manifest is None:
        return None
    dropped = _dropped(run, place)
    found: Counter[str] = Counter(outputs=1)
    run.timings(*place)
    for file in manifest.files:
        if file in dropped:
            found["pruned"] += 1
            continue
        _check_file(run, manifest, file, run.path_of(file, *place))
        found.update(files=1, bytes=file.bytes, rows=file.rows or 0)
    counts.update(found)
    return manifest


def _dropped(run: Run, place: Place) -> list[FileRecord]:
    """Files that retention removed. Where its note is gone too, that is not believed of the newest two."""
    output, iteration = place
    if output != "update" or iteration is None or not run.is_pruned(iteration):
        return []
    newest = [number for number in run.iterations() if run.folder(output, number).exists()][-2:]
    noted = (run.folder(*place) / PRUNED).exists()  # a fork may begin with one that was
    return run.checkpoint_records(iteration) if noted or iteration not in newest else []


def _gone(run: ActiveRun, readers: dict[Place, Place], wrong: dict[Place, str]) -> dict[Place, str]:
    """Outputs that are not there, though another was made from them. readers: of what, who read it."""
    found: dict[Place, str] = {}
    # A writer may have taken away both meanwhile.
    look = [(place, reader) for place, reader in readers.items() if run.manifest(*reader)]
    look += [(read, place) for place in wrong for read in read_by(run, place)]
    while look:
        place, reader = look.pop()
        # Staged: a crash came between two renames, which the next writer finishes.
        if place in wrong or place in found or run.manifest(*place) or run.is_staged(*place):
            continue
        found[place] = f"{run.folder(*place)}: gone, though {_text(reader)} was made from it"
        look += [(read, place) for read in read_by(run, place)]
    return found


def _text(place: Place) -> str:
    output, iteration = place
    return output if iteration is None else f"{output} of iteration {iteration}"


def _in_order(place: Place) -> tuple[int, int]:
    output, iteration = place
    return (-1, 0) if iteration is None else (iteration, list(OUTPUTS).index(output))


def _check_file(run: Run, manifest: Manifest, file: FileRecord, path: Path) -> None:
    run.verify(file, path)
    if file.table is None:
        return
    found = tables.decode(file.table, [(path, path.read_bytes())])
    if len(found) != file.rows:
        raise CorruptError(f"{path}: {len(found)} rows, but its manifest says {file.rows}")
    _check_iterations(manifest, path, found)


def _check_iterations(manifest: Manifest, path: Path, found: "pa.Table") -> None:
    """Rows are of their output's iteration; log-probs also of the earlier ones that update trained on."""
    at = manifest.iteration
    replayed = manifest.config.get("update", {}).get("replay_iterations", 0)
    for column in {"iteration", "update_iteration"} & set(found.column_names):
        earlier = replayed if column == "iteration" and "update_iteration" in found.column_names else 0
        allowed = set(range(at - earlier, at + 1)) if at is not None else set()
        if set(found[column].unique().to_pylist()) - allowed:
            raise CorruptError(f"{path}: holds rows of another iteration than {at}")
