"""runner: iterations x stages. What runs next.

What is done and what is stale is read from manifests; the runner remembers nothing.
"""

from collections.abc import Callable

from grpo.artifacts import ActiveRun, Stop, lacking, prune, stop_at
from grpo.errors import InputError
from grpo.pipeline.lane import SampleLane
from grpo.pipeline.resources import Resources
from grpo.pipeline.signal import without_signal
from grpo.pipeline.stages import EVALUATE, GENERATE, STAGES, UPDATE, Stage
from grpo.pipeline.states import differences_of, nearest_policy, state_of, states
from grpo.update.schedule import learning_rate


def run_iterations(
    run: ActiveRun, until: int, report: Callable[[int], None], report_policy: Callable[[int], None]
) -> tuple[int, int, Stop | None]:
    """Complete iterations 0 .. until-1, doing only what is missing; how many were worked on, and evaluated.

    With `evaluate`, policies 0, n, ... and `until` are measured first. What `stop` found, where that ends the
    run, comes third. Never replaces a committed output. Raises InputError (exit 4) when anything is stale.
    """
    with run.steady():
        complete = _complete(run)
        prune(run)  # what a killed one left
    worked, evaluated, begun = 0, 0, False
    with Resources(run) as resources, SampleLane(run, resources) as lane:
        for iteration in sorted({*range(until + 1)} - complete):
            trained = False
            while todo := lane.without_begun(what_to_do(run, iteration, until), iteration):
                stage, number = todo[0]
                if stage is not EVALUATE and not trained and (ended := stop_at(run, iteration)):
                    resources.keep_newest()
                    return worked, evaluated, ended
                if not begun:
                    _say_changes(run, todo, iteration)
                    for line in without_signal(run.config) if iteration == 0 else ():
                        run.console.say(line)
                    _check_before(run, resources, until)
                    begun = True
                run.console.stop_requested()
                lane.perform(stage, number, iteration)
                if stage is EVALUATE:
                    report_policy(iteration)
                    evaluated += 1
                else:
                    trained = True
            if trained:
                worked += 1
                report(iteration)
        resources.keep_newest()
    if not begun and until:
        _say_changes(run, [], until - 1)  # all is history: what differs is for what may come next
    return worked, evaluated, None


def check_fresh(run: ActiveRun, until: int) -> tuple[list[tuple[Stage, int]], int]:
    """What a plain run does first, and of which iteration. Raises InputError (exit 4) where it cannot."""
    complete = _complete(run)
    for iteration in (number for number in range(until + 1) if number not in complete):
        if todo := what_to_do(run, iteration, until):
            return todo, iteration
    return [], until - 1


def say_differences(run: ActiveRun, until: int) -> None:
    """Say what a plain run would say before it begins. Raises InputError (exit 4) where none would."""
    todo, iteration = check_fresh(run, until)
    if iteration >= 0:
        _say_changes(run, todo, iteration)


def what_to_do(run: ActiveRun, iteration: int, until: int) -> list[tuple[Stage, int]]:
    """What is not done, in order, until the next policy is there: stages, and of which iteration.

    First the evaluation of the policy that the iteration trains, then what is sampled from that policy: with
    generate.policy_lag the rollouts of later iterations too, while it need not be loaded.
    Asked after each stage: with generate.dynamic_sampling, what the rewards show may open generate again.
    """
    measured = [(EVALUATE, iteration)] if evaluation_is_due(run, iteration, until) else []
    ahead = min(iteration + run.config.generate.policy_lag, until - 1)
    wanted = [(GENERATE, number) for number in range(iteration, ahead + 1)]
    wanted += [(stage, iteration) for stage in STAGES[1:] if iteration < until]
    return measured + [(stage, number) for stage, number in wanted if _is_open(run, stage, number)]


def _check_before(run: ActiveRun, resources: Resources, until: int) -> None:
    """What no stage can use must stop before rollouts are paid for."""
    for stage in (*STAGES, *([EVALUATE] if run.config.evaluate is not None else [])):
        stage.load().check(run, until, resources.borrow)


def evaluation_is_due(run: ActiveRun, policy: int, until: int) -> bool:
    """Whether `grpo run` measures a policy: one of those configured, not measured, and not yet gone past.

    What was sampled from before `evaluate` was configured, or otherwise, is history: with a lag, when the
    next policy had been made.
    """
    config = run.config.evaluate
    if config is None or (policy % config.every and policy != until):
        return False
    passed = UPDATE if run.config.generate.policy_lag else GENERATE
    if run.manifest(passed.output, policy) is not None:
        return False
    return state_of(run, EVALUATE, policy, set()).name in ("missing", "partial", "stale")


def _is_open(run: ActiveRun, stage: Stage, iteration: int) -> bool:
    """Whether an output is missing or partial.

    Raises InputError (exit 4) for rollouts that want another round of what is configured otherwise now.
    """
    manifest = run.manifest(stage.output, iteration)
    lacks = lacking(run, manifest)
    unfinished_rounds = manifest if lacks and stage is GENERATE else None
    if unfinished_rounds is not None and (changes := differences_of(run, stage, unfinished_rounds)):
        raise InputError(
            f"run {run.name}: generate of iteration {iteration} is partial ({lacks}) and changed"
            f" ({'; '.join(changes)}); put that back, or rerun it with `grpo run --from {iteration}`"
        )
    return manifest is None or bool(lacks)


def _complete(run: ActiveRun) -> set[int]:
    """Iterations in which nothing is to be done. Raises InputError (exit 4) where anything is stale."""
    complete = set()
    for iteration, by_stage in states(run).items():
        if all(state.name in ("done", "changed") for state in by_stage.values()):
            complete.add(iteration)
        for name, state in by_stage.items():
            if state.name == "stale":
                raise InputError(
                    f"run {run.name}: {name} of iteration {iteration} is stale ({state.why});"
                    f" {_way_out(run, iteration, name)}"
                )
    return complete


def _way_out(run: ActiveRun, iteration: int, name: str) -> str:
    """What to do about a stale output: first make again what it read and what is no longer there."""
    before = STAGES[: [stage.name for stage in STAGES].index(name)]
    found = {stage.name: run.manifest(stage.output, iteration) for stage in before}
    missing = [stage for stage, manifest in found.items() if manifest is None or lacking(run, manifest)]
    again = missing[0] if missing else name
    needs_policy = not missing or again in (GENERATE.name, UPDATE.name)  # --from goes on to the update
    if needs_policy and (nearest := nearest_policy(run, iteration)) < iteration:
        return (
            f"policy {iteration} is gone: `grpo run --from {nearest}` reruns it and everything after;"
            f" `grpo fork {run.name} NEW --iteration {nearest}` does so in a new run"
        )
    if missing:
        verb = "rebuilds it" if found[again] is None else "resumes it"
        return f"`grpo {again} --iteration {iteration}` {verb}"
    return (
        f"`grpo run --from {iteration}` reruns it and everything after;"
        f" `grpo {name} --iteration {iteration}` reruns it alone"
    )


def _say_changes(run: ActiveRun, todo: list[tuple[Stage, int]], iteration: int) -> None:
    """Name each key that is not what the last manifest of its stage was made with."""
    measured = [policy for policy in run.evaluations() if policy <= iteration]
    if run.config.evaluate is not None and measured:
        last = run.manifest(EVALUATE.output, measured[-1])
        for change in differences_of(run, EVALUATE, last) if last else ():
            run.console.say(f"from the next evaluation: {change}")
    for stage in STAGES:
        ahead = run.config.generate.policy_lag if stage is GENERATE else 0
        first = next((number for each, number in todo if each is stage), iteration + ahead + 1)
        last = run.manifest(stage.output, first - 1) if first else None
        for change in differences_of(run, stage, last) if last else ():
            run.console.say(f"from iteration {first}: {change}{_step_of_rate(run, first, change)}")


def _step_of_rate(run: ActiveRun, iteration: int, change: str) -> str:
    """Of another length of the run under a schedule: the learning rate before and behind `iteration`."""
    if not change.startswith("iterations: ") or iteration >= run.config.iterations:
        return ""
    before = run.read("updates", iteration - 1, ["learning_rate"])["learning_rate"].to_pylist()[-1:]
    after = learning_rate(run.config, iteration, 0)
    return "".join(f"; the learning rate steps from {rate:.3g} to {after:.3g}" for rate in before)
