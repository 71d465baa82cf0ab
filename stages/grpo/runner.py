"""runner: iterations x stages. What is done, what is stale, what runs next.

The state of everything is read from manifests; the runner remembers nothing. `grpo run` and the stage
commands take the same path through `perform`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.advantage import stage as advantage
from grpo.artifacts import (
    Manifest,
    Plan,
    Run,
    Staging,
    choose_attempt,
    discard,
    files,
    holder_of,
    lacking,
    prune,
    read_sealed,
    require_space,
    seal,
    staged_attempts,
    unscored_rounds,
)
from grpo.errors import InputError, UsageError
from grpo.generate import stage as generate
from grpo.score import stage as score
from grpo.update import stage as update
from grpo.update.check import check_start


@dataclass(frozen=True)
class Stage:
    """A stage as the runner sees it; the functions are those of its stage.py."""

    name: str
    output: str
    plan: Callable[[Run, int], Plan]
    open_tool: Callable[[Run], AbstractContextManager[Any]]
    run: Callable[[Run, int, Staging, Any], Manifest]
    release: Callable[[Any], None]


STAGES = tuple(
    Stage(module.NAME, module.OUTPUT, module.plan, module.open_tool, module.run, module.release)
    for module in (generate, score, advantage, update)
)


@dataclass(frozen=True)
class State:
    """Of one stage in one iteration: done, partial, stale, differs or missing; and why."""

    name: str
    why: str = ""


class Tools:
    """What is slow to set up, opened when a stage first needs it and kept until the end."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._working: Stage | None = None

    def __enter__(self) -> "Tools":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, stage: Stage) -> Any:
        """The stage's tool. That of the stage before leaves the accelerator first: they take turns."""
        if self._working is not None and self._working is not stage:
            self._working.release(self._open[self._working.name])
        self._working = stage
        if stage.name not in self._open:
            self._open[stage.name] = self._stack.enter_context(stage.open_tool(self._run))
        return self._open[stage.name]


def perform(run: Run, stage: Stage, iteration: int, tools: Tools, force: bool = False) -> Manifest:
    """Bring one stage of one iteration up to date: do it, finish it, or find that nothing is to be done."""
    plan = stage.plan(run, iteration)
    committed = run.manifest(stage.output, iteration)
    attempt = choose_attempt(run, plan, committed, force)
    if committed is not None and committed.fingerprint == plan.fingerprint(attempt):
        return committed
    require_space(run, stage.output, iteration)
    tool = tools.get(stage)
    manifest = stage.run(run, iteration, Staging(run, plan, attempt), tool)
    if stage.output == update.OUTPUT:
        prune(run)
    return manifest


def states(run: Run, until: int | None = None) -> dict[int, dict[str, State]]:
    """State of every stage of every iteration on disk (up to `until`), by iteration and stage name."""
    stale: set[tuple[str, int | None]] = set()
    found: dict[int, dict[str, State]] = {}
    for iteration in run.iterations():
        if until is not None and iteration > until:
            break
        found[iteration] = {stage.name: _state(run, stage, iteration, stale) for stage in STAGES}
    return found


def _state(run: Run, stage: Stage, iteration: int, stale: set[tuple[str, int | None]]) -> State:
    """State of one output; what is stale is added to `stale`, since what reads it is stale too."""
    manifest = run.manifest(stage.output, iteration)
    if manifest is None:
        return State("missing")
    reason = _stale_because(run, stage, iteration, manifest, stale)
    if reason:
        stale.add((stage.output, iteration))
        return State("stale", reason)
    if lacks := lacking(run, manifest):
        return State("partial", lacks)
    changes = differences_of(run, stage, manifest)
    return State("differs", "; ".join(changes)) if changes else State("done")


def _stale_because(
    run: Run, stage: Stage, iteration: int, manifest: Manifest, stale: set[tuple[str, int | None]]
) -> str:
    for reference, recorded in manifest.reads.items():
        present = run.id_of(reference)
        if present is None:
            return f"{reference} is gone"
        grown = stage.output == score.OUTPUT and unscored_rounds(run, manifest)
        if present != recorded and not grown:
            return f"{reference} changed"
        if holder_of(reference) in stale:
            return f"{reference} is stale"
    try:
        plan = stage.plan(run, iteration)
    except InputError as error:
        return str(error)
    except UsageError:
        return ""  # the user's function or SQL is gone: that differs
    added = [reference for reference in plan.reads if reference not in manifest.reads]
    return f"{added[0]} is new" if added and not plan.differences(manifest) else ""


def run_iterations(run: Run, until: int, report: Callable[[int], None]) -> int:
    """Complete iterations 0 .. until-1, doing only what is missing; returns how many were worked on.

    Never replaces a committed output. Raises InputError (exit 4) when anything is stale.
    """
    _refuse_stale(run, states(run))
    prune(run)  # what a killed one left
    worked = 0
    with Tools(run) as tools:
        for iteration in range(until):
            todo = [stage for stage in STAGES if _is_open(run, stage, iteration)]
            if not todo:
                continue
            if not worked:
                _say_changes(run, todo, iteration)
                # What score and update cannot use must stop before rollouts are paid for.
                check_start(run, until)
                tools.get(STAGES[1])
            # With generate.resample, what the rewards show may open the stage before again.
            while (
                stage := next((each for each in STAGES if _is_open(run, each, iteration)), None)
            ) is not None:
                run.console.stop_requested()
                perform(run, stage, iteration, tools)
            worked += 1
            report(iteration)
    return worked


def _is_open(run: Run, stage: Stage, iteration: int) -> bool:
    """Whether an output is missing or partial.

    Raises InputError (exit 4) for rollouts that want another round of what is configured otherwise now.
    """
    manifest = run.manifest(stage.output, iteration)
    lacks = lacking(run, manifest)
    unfinished_rounds = manifest if lacks and stage.name == generate.NAME else None
    if unfinished_rounds is not None and (changes := differences_of(run, stage, unfinished_rounds)):
        raise InputError(
            f"run {run.name}: generate of iteration {iteration} is partial ({lacks}) and differs"
            f" ({'; '.join(changes)}); put that back, or `grpo run --from {iteration}` does it again"
        )
    return manifest is None or bool(lacks)


def _refuse_stale(run: Run, present: dict[int, dict[str, State]]) -> None:
    for iteration, by_stage in present.items():
        for name, state in by_stage.items():
            if state.name == "stale":
                raise InputError(
                    f"run {run.name}: {name} of iteration {iteration} is stale ({state.why});"
                    f" {_way_out(run, iteration, name)}"
                )


def _way_out(run: Run, iteration: int, name: str) -> str:
    """What to do about a stale output: first make again what it read and what is no longer there."""
    before = STAGES[: [stage.name for stage in STAGES].index(name)]
    found = {stage.name: run.manifest(stage.output, iteration) for stage in before}
    missing = [stage for stage, manifest in found.items() if manifest is None or lacking(run, manifest)]
    again = missing[0] if missing else name
    if again in (generate.NAME, update.NAME) and iteration and run.is_pruned(iteration - 1):
        nearest = max(number for number in run.policies() if number <= iteration)
        return (
            f"policy {iteration} was pruned: `grpo run --from {nearest}` does it and all that follows again,"
            f" `grpo fork {run.name} NEW --iteration {nearest}` too, elsewhere"
        )
    if missing:
        verb = "makes it again" if found[again] is None else "goes on with it"
        return f"`grpo {again} --iteration {iteration}` {verb}"
    return (
        f"`grpo run --from {iteration}` does it and all that follows again,"
        f" `grpo {name} --iteration {iteration}` it alone"
    )


def _say_changes(run: Run, todo: list[Stage], iteration: int) -> None:
    """Name each key that is not what the last manifest of its stage was made with."""
    for stage in STAGES:
        last = run.manifest(stage.output, iteration if stage not in todo else iteration - 1)
        if last is None or (stage in todo and iteration == 0):
            continue
        for change in differences_of(run, stage, last):
            run.console.say(f"from iteration {iteration if stage in todo else iteration + 1}: {change}")


def differences_of(run: Run, stage: Stage, manifest: Manifest) -> list[str]:
    """What changed in configuration and code since `manifest` of `stage`."""
    assert manifest.iteration is not None
    try:
        plan = stage.plan(run, manifest.iteration)
    except UsageError as error:
        return [str(error)]
    changes = plan.differences(manifest)
    return changes or ([] if plan.same_as(manifest) else ["its shard plan"])


def inputs_changed(run: Run, manifest: Manifest) -> bool:
    """Whether anything an output read has another id now."""
    return any(run.id_of(reference) != recorded for reference, recorded in manifest.reads.items())


def start_over(run: Run, iteration: int) -> None:
    """`--from N`: note the intent, then clear the way; a killed one is finished by the next run.

    Raises InputError (exit 4), with nothing moved, when the checkpoint to go on from was pruned or something
    before `iteration` is missing or stale: a plain run could not go on from there.
    """
    present = states(run, iteration)  # what is later goes, however damaged it is
    for number in range(iteration):
        for name, state in present.get(number, {STAGES[0].name: State("missing")}).items():
            if state.name in ("missing", "partial", "stale"):
                raise InputError(
                    f"--from {iteration}: {name} of iteration {number} is {state.name}; nothing was moved;"
                    f" begin with that: --from {number}, or `grpo {name} --iteration {number}`"
                )
    _, redone = done_again(run, iteration)
    if redone or run.manifest(update.OUTPUT, iteration) is None:
        run.require_checkpoint(iteration)
    files.write_file(intent_path(run), seal({"from": iteration}))
    files.sync_folder(run.path)
    finish_start_over(run)


def finish_start_over(run: Run) -> None:
    """Move later iterations, then what is stale or differs in N and what follows it there, to .trash."""
    first = read_intent(run)
    if first is None:
        return
    later, redone = done_again(run, first)
    for iteration in reversed(later):
        discard(run, run.staging_root(iteration))
        discard(run, run.iteration_root(iteration))
    discard(run, run.staging_root(first))
    for stage in reversed(redone):  # nothing stays that was made from what is gone
        discard(run, run.folder(stage.output, first))
    files.remove_file(intent_path(run))
    files.sync_folder(run.path)


def intent_path(run: Run) -> Path:
    """Where `--from` notes what it is about to do."""
    return run.path / ".from.json"


def read_intent(run: Run) -> int | None:
    """The N of a `--from N` that is not finished. Raises CorruptError (exit 6) when it cannot be read."""
    path = intent_path(run)
    return int(read_sealed(path, **{"from": int})["from"]) if path.exists() else None


def done_again(run: Run, first: int) -> tuple[list[int], list[Stage]]:
    """What `--from` does again: later iterations, and stages of `first` from a stale or differing one on.

    Also its update where that was pruned: the policy to go on from is made once more.
    """
    by_stage = states(run, first).get(first, {})
    old = {name for name, state in by_stage.items() if state.name in ("stale", "differs")}
    old |= {update.NAME} if run.is_pruned(first) else set()
    changed = [stage.name in old for stage in STAGES]
    stages = STAGES[changed.index(True) :] if any(changed) else ()
    return [n for n in run.iterations() if n > first], [stage for stage in stages if stage.name in by_stage]


def followers(run: Run, output: str, iteration: int) -> list[str]:
    """Outputs on disk that read `output` of `iteration`, directly or not: `update@3`, in order."""
    reached: set[tuple[str, int | None]] = {(output, iteration)}
    texts = []
    for number in (n for n in run.iterations() if n >= iteration):
        for stage in STAGES:
            manifest = run.manifest(stage.output, number)
            if manifest is None or (stage.output, number) in reached:
                continue
            holders = {holder_of(reference) for reference in manifest.reads}
            if holders & reached:
                reached.add((stage.output, number))
                texts.append(f"{stage.output}@{number}")
    return texts


def unfinished(run: Run, stage: Stage, iteration: int) -> bool:
    """Whether an attempt at the output was begun and not committed."""
    try:
        return bool(staged_attempts(run, stage.plan(run, iteration)))
    except InputError:
        return False
