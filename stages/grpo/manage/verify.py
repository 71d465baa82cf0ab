"""verify: every hash, every schema and every invariant of a run, and what to do where one does not hold."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grpo import sql, tables
from grpo.artifacts import (
    CHECKPOINT,
    MANIFEST,
    OUTPUTS,
    POLICY,
    RUN_OUTPUTS,
    ActiveRun,
    FileRecord,
    Manifest,
    Run,
    check_source,
    check_staged,
    discard,
    durable_policies,
    files,
    holder_of,
    kept_sources,
    open_run,
    read_json,
    read_stop,
    staging_folders,
    stopped_path,
)
from grpo.console import printable, stdout_console
from grpo.errors import CorruptError
from grpo.inspect import policies
from grpo.inspect.track import note_path, read_note
from grpo.manage.repair import Damage, Place, command_for, damages, read_by
from grpo.models.tokenizer import starting_policy
from grpo.pipeline.restart import intent_path, read_intent
from grpo.pipeline.states import evaluation_states, states
from grpo.prompts.table import HELD_OUT

_MOST_GONE = 1000  # iterations that were lost: each of their outputs is looked for and reported
_MOST_TOKENS = 2**31
_COUNTS = ("outputs", "files", "bytes", "rows")


@dataclass
class Report:
    """What was looked at, and what was found."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_COUNTS, 0)))
    damages: list[Damage] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    """Invariant -> rows that break it; only looked at where nothing is damaged."""
    stale: list[str] = field(default_factory=list)
    policies: dict[str, Any] = field(default_factory=dict)
    """Which are on disk, and what the newest would be rebuilt from."""

    @property
    def exit_code(self) -> int:
        """0, or 6 where something is damaged."""
        return CorruptError.exit_code if self.damages or self.broken else 0

    def describe(self) -> dict[str, Any]:
        """The report as plain data."""
        damaged = [{"found": each.found, "redo": each.redo or None} for each in self.damages]
        rest = {"broken": self.broken, "stale": self.stale, "policies": self.policies, "exit": self.exit_code}
        return {**self.counts, "damaged": damaged, **rest}


def verify(run: ActiveRun, set_aside: bool) -> Report:
    """Look at all of a run. set_aside: move what can be made again to .trash, which needs the lock."""
    report = Report(damages=_links(run))
    if any(each.aside and each.aside.is_dir() for each in report.damages):
        _set_aside(run, report, set_aside)  # what lies behind a link is not of this run: no look at it
        return report
    report.damages += _damaged_notes(run)
    places: list[Place] = [(output, None) for output in RUN_OUTPUTS]
    numbers = sorted({*run.iterations(), *run.evaluations()})
    if strange := _of_another_run(run, numbers):
        report.damages.append(strange)
        return report
    places += [(output, iteration) for iteration in numbers for output in (*OUTPUTS, CHECKPOINT)]
    wrong, readers = _check_outputs(run, places, report.counts)
    texts = kept_sources(run).values()
    report.counts.update(files=len(texts), bytes=sum(path.lstat().st_size for path in texts))
    report.damages += damages(run, wrong | _gone(run, readers, wrong))
    report.stale = _unfinished(run)
    if not report.damages and not report.stale:
        report.broken, report.stale = _broken(run), _stale(run)
    if not report.damages:
        report.policies = policies.describe(run)
    _set_aside(run, report, set_aside)
    return report


def _broken(run: ActiveRun) -> dict[str, int]:
    known, found = {"vocabulary_size": _vocabulary_size(run)}, dict[str, int]()
    for name in ("invariants", "teacher_invariants", "token_invariants"):
        rows = sql.read([run], sql.own_text(f"sql/views/{name}"), known).to_pylist()
        found |= {row["invariant"]: row["rows"] for row in rows}
    return found


def _vocabulary_size(run: ActiveRun) -> int:
    """Of the newest policy on disk or the starting one, by its configuration.

    As many as a column holds where none says.
    """
    held = [run.folder(CHECKPOINT, policy - 1) / POLICY for policy in durable_policies(run)[:0:-1]]
    for folder in filter(None, [*held, starting_policy(run)]):
        path = folder / "config.json"
        if path.is_file():
            config = read_json(path)
            text = config.get("text_config")
            size = (text if isinstance(text, dict) else config).get("vocab_size")
            if isinstance(size, int) and 0 < size < _MOST_TOKENS:
                return size
    return _MOST_TOKENS


def _of_another_run(run: Run, numbers: list[int]) -> Damage | None:
    if not numbers or numbers[-1] - len(numbers) <= _MOST_GONE:
        return None
    what = f"{run.iteration_root(numbers[-1])}: is there, and {len(numbers) - 1} iterations before it are"
    return Damage(f"{what}: it is of another run; move it away", "")


def _set_aside(run: Run, report: Report, wanted: bool) -> None:
    for each in report.damages if wanted else ():
        if each.aside is not None and each.aside.is_symlink():
            files.remove_file(each.aside)  # the link; what it leads to stays
        elif each.aside is not None:
            discard(run, each.aside)


def _links(run: Run) -> list[Damage]:
    found = []
    for path in run.links():
        what = f"{path}: is a link to {os.path.realpath(path)}, and a run has none"
        found.append(Damage(what, "grpo run", path if path != run.path else None))
    return found


def print_report(run: Run, report: Report, discarded: bool) -> None:
    """The report as a person reads it. discarded: what is damaged is in .trash already."""
    out = partial(stdout_console().print, markup=False, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        out(printable(text))

    counts, found = report.counts, report.damages
    for each in found:
        say(f"damaged  {each.found}")
    for invariant, rows in report.broken.items():
        say(f"broken   {invariant}: {rows} rows")
    for text in report.stale:
        say(f"stale    {text}")
    say(
        f"run {run.name}: {counts['outputs']:,} outputs, {counts['files']:,} files"
        f" ({counts['bytes'] / 2**20:,.1f} MiB) and {counts['rows']:,} rows read;"
        f" {len(found)} damaged, {len(report.broken)} broken, {len(report.stale)} stale"
    )
    if report.policies and report.policies["newest"]:
        say(policies.line_of(report.policies))
    if any(each.aside for each in found):
        first = "moved to .trash" if discarded else "`grpo verify --discard` moves it to .trash"
        say(first if all(each.redo for each in found) else f"what can be rebuilt: {first}")
    if redo := dict.fromkeys(each.redo for each in found if each.redo):
        say(f"to rebuild it, with the configuration of run {run.name}: {'; '.join(redo)}")


def _damaged_notes(run: ActiveRun) -> list[Damage]:
    """Of what is no output: run.json, notes of `--from` and the tracker, kept sources, unfinished work."""
    found = []
    notes: list[tuple[Path, str, Callable[[], object]]] = [
        (run.path / "run.json", "grpo run", partial(open_run, run.path)),
        (intent_path(run), "grpo run", partial(read_intent, run)),
        (note_path(run), "grpo run", partial(read_note, run)),
        (stopped_path(run), "grpo run", partial(read_stop, run)),
    ]
    for digest, kept in kept_sources(run).items():
        notes.append((kept, "grpo run", partial(check_source, digest, kept)))
    for folder, place in staging_folders(run).items():
        notes.append((folder, command_for(*place), partial(check_staged, run, folder)))
    for path, redo, check in notes:
        try:
            check()
        except CorruptError as error:
            if path.exists():  # else a writer has committed it meanwhile
                found.append(Damage(str(error), redo, path))
    folders = [run.iteration_root(number) for number in {*run.iterations(), *run.evaluations()}]
    for path in (run.trash, run.staging_root(None), *folders):
        if path.exists() and not path.is_dir():
            found.append(Damage(f"{path}: is a file where a folder belongs; remove it", "grpo run"))
    return found


def _check_outputs(
    run: ActiveRun, places: list[Place], counts: Counter[str]
) -> tuple[dict[Place, str], dict[Place, Place]]:
    """What is wrong at each place where anything is; and of what was read, who read it."""
    wrong: dict[Place, str] = {}
    readers: dict[Place, Place] = {}
    with run.console.progress("verify", len(places), "outputs") as advance:
        for place in places:
            run.console.stop_requested()
            try:
                manifest = _check_output(run, place, counts)
            except CorruptError as error:
                wrong[place] = str(error)
            else:
                for reference in manifest.inputs if manifest else ():
                    readers.setdefault(holder_of(reference), place)
                if manifest is not None and "evaluate.prompts" in manifest.user_files:
                    readers.setdefault((HELD_OUT, None), place)
            advance(1)
    return wrong, readers


def _check_output(run: Run, place: Place, counts: Counter[str]) -> Manifest | None:
    """Its manifest; raises the first thing that is wrong with it: all of it is made again together."""
    with suppress(CorruptError, FileNotFoundError):
        return _look_at(run, place, counts)
    return _look_at(run, place, counts)  # once more: a writer may have replaced or dropped it meanwhile


def _look_at(run: Run, place: Place, counts: Counter[str]) -> Manifest | None:
    manifest = run.manifest(*place)
    if manifest is None:
        return None
    held = manifest.files
    run.timings(*place)
    run.period(*place)
    for file in held:
        _check_file(run, manifest, file, run.path_of(file, *place))
    sizes = {"bytes": sum(file.bytes for file in held), "rows": sum(file.rows or 0 for file in held)}
    counts.update(outputs=1, files=len(held), **sizes)
    return manifest


def _check_file(run: Run, manifest: Manifest, file: FileRecord, path: Path) -> None:
    """Hash, schema and keys: rows are of their output's iteration, log-probs also of those replayed."""
    run.verify(file, path)
    if file.table is None:
        return
    found = tables.decode(file.table, [(path, path.read_bytes())])
    if len(found) != file.rows:
        raise CorruptError(f"{path}: {len(found)} rows, but its manifest says {file.rows}")
    at = manifest.iteration
    replayed = manifest.config.get("update", {}).get("replay_iterations", 0)
    for column in {"iteration", "update_iteration"} & set(found.column_names):
        earlier = replayed if column == "iteration" and "update_iteration" in found.column_names else 0
        held = set(found[column].unique().to_pylist())
        if at is None or not all(number is not None and at - earlier <= number <= at for number in held):
            raise CorruptError(f"{path}: holds rows of another iteration than {at}")


def _gone(run: ActiveRun, readers: dict[Place, Place], wrong: dict[Place, str]) -> dict[Place, str]:
    """Outputs that are not there, though another was made from them. readers: of what, who read it."""
    found: dict[Place, str] = {}
    # A writer may have taken away both meanwhile.
    look = [(place, reader) for place, reader in readers.items() if run.manifest(*reader)]
    look += [(read, place) for place in wrong for read in read_by(run, place)]
    while look:
        place, (output, iteration) = look.pop()
        # Staged: a crash came between two renames, which the next writer finishes.
        if place in wrong or place in found or run.manifest(*place) or run.is_staged(*place):
            continue
        reader = output if iteration is None else f"{output} of iteration {iteration}"
        found[place] = f"{run.folder(*place)}: gone, though {reader} was made from it"
        look += [(read, place) for read in read_by(run, place)]
    return found


def _unfinished(run: Run) -> list[str]:
    """What a crash came between, and the next command finishes: until then some outputs look stale."""
    with suppress(CorruptError):  # which is reported already
        if (first := read_intent(run)) is not None:
            return [f"--from {first}: not finished; the next `grpo run` resumes it"]
    written = [folder for folder in staging_folders(run) if (folder / MANIFEST).exists()]
    return [f"{folder}: written, and moved to its place by the next command" for folder in written]


def _stale(run: ActiveRun) -> list[str]:
    present = states(run)
    found = {
        f"{name} of iteration {iteration}": state
        for iteration, by_stage in present.items()
        for name, state in by_stage.items()
    }
    evaluated = evaluation_states(run, present)
    found |= {f"evaluation of policy {policy}": state for policy, state in evaluated.items()}
    return [f"{what}: {state.why}" for what, state in found.items() if state.name == "stale"]
