"""runner: iterations x stages. What is done, what is stale, what runs next.

The state of everything is read from manifests; the runner remembers nothing. `grpo run` and the stage
commands take the same path through `perform`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from grpo.advantage import stage as advantage
from grpo.artifacts import (
    Manifest,
    Plan,
    Run,
    Staging,
    choose_attempt,
    holder_of,
    lacking,
    prune,
    require_space,
    staged_attempts,
    unscored_rounds,
)
from grpo.errors import InputError, UsageError
from grpo.evaluate import evaluation
from grpo.generate import stage as generate
from grpo.generate.selection import check as check_prompts_sql
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
# No stage of the four, but done in the same way: with the tools of two of them, so it opens none.
EVALUATION = Stage(
    evaluation.NAME,
    evaluation.OUTPUT,
    evaluation.plan,
    lambda _: nullcontext(),
    evaluation.run,
    lambda _: None,
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
        return self._opened(stage)

    def borrow(self, name: str, beside: bool = False) -> Any:
        """The tool of the stage `name` for an evaluation. beside: the one that works may stay where it is."""
        [stage] = [stage for stage in STAGES if stage.name == name]
        return self._opened(stage) if beside else self.get(stage)

    def _opened(self, stage: Stage) -> Any:
        if stage.name not in self._open:
            self._open[stage.name] = self._stack.enter_context(stage.open_tool(self._run))
        return self._open[stage.name]


def perform(
    run: Run, stage: Stage, iteration: int, tools: Tools, force: bool = False, only_failed: bool = False
) -> Manifest:
    """Bring one stage of one iteration up to date: do it, finish it, or find that nothing is to be done.

    force: anew, whatever is there; only_failed: anew for the rows that failed.
    """
    plan = stage.plan(run, iteration)
    committed = run.manifest(stage.output, iteration)
    attempt = choose_attempt(run, plan, committed, force, only_failed)
    if committed is not None and committed.fingerprint == plan.fingerprint(attempt):
        return committed
    require_space(run, stage.output, iteration)
    tool = tools.borrow if stage is EVALUATION else tools.get(stage)
    manifest = stage.run(run, iteration, Staging(run, plan, attempt, only_failed), tool)
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
        found[iteration] = {stage.name: state_of(run, stage, iteration, stale) for stage in STAGES}
    return found


def state_of(run: Run, stage: Stage, iteration: int, stale: set[tuple[str, int | None]]) -> State:
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


def run_iterations(
    run: Run, until: int, report: Callable[[int], None], report_policy: Callable[[int], None]
) -> int:
    """Complete iterations 0 .. until-1, doing only what is missing; returns how many were worked on.

    With `evaluate`, policies 0, n, 2n ... and `until` are measured before anything is sampled of them.

    Never replaces a committed output. Raises InputError (exit 4) when anything is stale.
    """
    _refuse_stale(run, states(run))
    prune(run)  # what a killed one left
    worked, begun = 0, False
    with Tools(run) as tools:
        for iteration in range(until + 1):
            todo = [s for s in STAGES if iteration < until and _is_open(run, s, iteration)]
            measured = not evaluation_is_due(run, iteration, until)
            if measured and not todo:
                continue
            if not begun:
                _say_changes(run, todo, iteration)
                # What no stage can use must stop before rollouts are paid for.
                check_start(run, until)
                check_prompts_sql(run)
                advantage.check(run)
                check_rewards(run, tools)
                begun = True
            if not measured:
                run.console.stop_requested()
                perform(run, EVALUATION, iteration, tools)
                report_policy(iteration)
            if not todo:
                continue
            # With generate.resample, what the rewards show may open the stage before again.
            while (
                stage := next((each for each in STAGES if _is_open(run, each, iteration)), None)
            ) is not None:
                run.console.stop_requested()
                perform(run, stage, iteration, tools)
            worked += 1
            report(iteration)
    return worked


def check_rewards(run: Run, tools: Tools) -> None:
    """Open what scores. UsageError (exit 2) for a function that is no use, on held-out prompts too."""
    scorers = tools.get(STAGES[1])
    if run.config.evaluate is not None:
        evaluation.check(run, scorers)


def evaluation_is_due(run: Run, policy: int, until: int) -> bool:
    """Whether `grpo run` measures a policy: one of those configured, not measured, and not yet sampled from.

    What was sampled from before `evaluate` was configured, or otherwise, is history.
    """
    config = run.config.evaluate
    if config is None or (policy % config.every and policy != until):
        return False
    if run.manifest(STAGES[0].output, policy) is not None:
        return False
    return state_of(run, EVALUATION, policy, set()).name in ("missing", "partial", "stale")


def evaluation_states(run: Run, present: dict[int, dict[str, State]]) -> dict[int, State]:
    """State of the evaluation of every policy that has one. present: as states() gives it."""
    stale: set[tuple[str, int | None]] = {
        (stage.output, iteration)
        for iteration, by_stage in present.items()
        for stage in STAGES
        if by_stage[stage.name].name == "stale"
    }
    return {policy: state_of(run, EVALUATION, policy, stale) for policy in run.evaluations()}


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
    needs_policy = not missing or again in (generate.NAME, update.NAME)  # --from goes on to the update
    if needs_policy and iteration and run.is_pruned(iteration - 1):
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
    measured = [policy for policy in run.evaluations() if policy <= iteration]
    if run.config.evaluate is not None and measured:
        last = run.manifest(EVALUATION.output, measured[-1])
        for change in differences_of(run, EVALUATION, last) if last else ():
            run.console.say(f"from the next evaluation: {change}")
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


def followers(run: Run, output: str, iteration: int) -> list[str]:
    """Outputs on disk that read `output` of `iteration`, directly or not: `update@3`, in order."""
    reached: set[tuple[str, int | None]] = {(output, iteration)}
    texts = []
    for number in sorted(n for n in {*run.iterations(), *run.evaluations()} if n >= iteration):
        for stage in (EVALUATION, *STAGES):
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
