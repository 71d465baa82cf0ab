"""work: what a command that works does once its run is open. The command line itself is in cli/."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.artifacts import (
    ActiveRun,
    Manifest,
    Run,
    Stop,
    digest,
    lacks_run_json,
    newest_policy,
    note_stop,
    prune,
)
from grpo.artifacts.layout import parse_iterations
from grpo.config import ArtifactsConfig, flatten
from grpo.console import iterations_text
from grpo.errors import InputError, UsageError
from grpo.evaluate import plan as evaluation
from grpo.models.device import busy
from grpo.models.find import resolve_model
from grpo.pipeline import restart, runner, states
from grpo.pipeline.resources import Resources
from grpo.pipeline.stages import BY_NAME, EVALUATE, UPDATE, Stage, perform


def run(
    opened: ActiveRun, until: int, report: Callable[[int], None], report_policy: Callable[[int], None]
) -> tuple[int, Stop | None]:
    """`grpo run`: complete iterations and say where nothing was to be done.

    How many were worked on, and what ended the run before `until`, if anything did.
    """
    _say_busy(opened)
    worked, measured, ended = runner.run_iterations(opened, until, report, report_policy)
    if ended is not None:
        way = "another `stop.patience`, or `--set stop=null`, goes on"
        best = f"`grpo export {opened.name} --best --out DIR` writes policy {ended.best.policy}"
        opened.console.say(f"run {opened.name}: {ended}; {best}; {way}")
    elif not worked and not measured:
        opened.console.say(f"run {opened.name}: {until} iterations are complete; nothing to do")
    if ended is not None or worked:
        note_stop(opened, ended)
    return worked, ended


def restart_from(opened: ActiveRun, first: int, yes: bool) -> None:
    """`--from N`: clear the way, unless told not to. yes: do not ask before anything is moved."""
    if not 0 <= first <= max(opened.iterations(), default=-1):  # N itself may be what is lost
        raise UsageError(
            f"--from {first}: run {opened.name} has no iteration {first}; it has {_range(opened)}"
        )
    if not yes:
        _confirm(opened, first)
    restart.start_over(opened, first)


def _say_busy(opened: ActiveRun) -> None:
    if how := busy():
        opened.console.say(f"this machine is busy ({how}): OMP_NUM_THREADS=1 may be many times faster")


def _confirm(opened: ActiveRun, first: int) -> None:
    """Ask before `--from` moves anything. UsageError (exit 2) for no, and where nobody can be asked."""
    later, stages = restart.done_again(opened, first)
    parts = [f"of iteration {first} {', '.join(stage.name for stage in stages)}"] if stages else []
    sampled = set(opened.iterations())
    if iterations := [number for number in later if number in sampled]:
        parts.append(f"all of {iterations_text(iterations)}")
    # The last policy has an evaluation and nothing else: it is no iteration.
    parts += [f"the evaluation of policy {number}" for number in later if number not in sampled]
    if not parts:
        return
    text = f"--from {first}: {' and '.join(parts)} will be rerun; what exists goes to .trash"
    if not sys.stdin.isatty():
        raise UsageError(f"{text}; give --yes too")
    if not opened.console.confirm(text):
        raise UsageError(f"--from {first}: not confirmed; nothing was moved")


def run_stage(
    opened: ActiveRun, name: str, wanted: str, force: bool, only_failed: bool = False
) -> list[dict[str, Any]]:
    """One stage command over the iterations asked for. Raises InputError (exit 4) for what differs.

    only_failed: of `score`, the rows that failed, and nothing else.
    """
    if force and only_failed:
        raise UsageError("--only-failed and --force cannot be combined: one keeps rows, the other reruns all")
    stage = BY_NAME[name]
    results = []
    iterations = (
        _failed_iterations(opened, stage, wanted) if only_failed else _iterations(opened, stage, wanted)
    )
    if only_failed and not iterations:
        opened.console.say(f"{name}: no reward failed; nothing to do")
    elif not iterations and force:
        raise UsageError(f"{name} --force: nothing is missing; say which to rerun with --iteration N")
    elif not iterations:
        opened.console.say(f"{name}: nothing to do; rerun it with --iteration N --force")
    if force or only_failed:
        _say_stale(opened, stage, iterations)
    with Resources(opened) as resources:
        for iteration in iterations:
            before = opened.manifest(stage.output, iteration)
            if before is not None:
                _check_replace(opened, stage, before, force, only_failed)
            manifest = perform(opened, stage, iteration, resources, force, only_failed)
            done = before is None or manifest.fingerprint != before.fingerprint
            rows, judgements = _rows_of(manifest)
            text = f"{rows} rows{f', {judgements} judgements' if judgements else ''}"
            opened.console.say(f"{name} {iteration}: {text if done else 'nothing to do, it is complete'}")
            results.append({"iteration": iteration, "done": done, "rows": rows, "ids": manifest.ids})
    if stage is UPDATE and any(result["done"] for result in results):
        prune(opened)  # also what another `checkpoints` kept
    return results


def _rows_of(manifest: Manifest) -> tuple[int, int]:
    """What a stage wrote, and the answers of judges that stand beside rewards."""
    judgements = sum(file.rows or 0 for file in manifest.files if file.table == "judgements")
    return manifest.rows - judgements, judgements


def _check_replace(opened: ActiveRun, stage: Stage, before: Manifest, force: bool, only_failed: bool) -> None:
    """Refuse what differs without --force, and rows that --only-failed cannot keep."""
    iteration = before.iteration
    if only_failed:
        _check_kept(opened, stage, before)
    if force or only_failed:
        return
    if states.inputs_changed(opened, before):
        return  # stale: it is done again without being asked twice
    if changes := states.differences_of(opened, stage, before):
        place = opened.folder(stage.output, iteration)
        kept = ", `grpo status` shows what was measured" if stage is EVALUATE else ""
        raise InputError(f"{place}: changed ({'; '.join(changes)}); --force reruns it{kept}")


def _say_stale(opened: ActiveRun, stage: Stage, iterations: list[int]) -> None:
    """Say in one line what may become stale where a stage is done again in `iterations`."""
    again = [number for number in iterations if opened.manifest(stage.output, number) is not None]
    after = states.followers(opened, stage.output, again) if again else []
    if after:
        more = f" and {len(after) - 4} more" if len(after) > 4 else ""
        what = f"{stage.name}: if results change"
        if len(again) == 1:
            what = f"{stage.name} {again[0]}: if its result changes"
        opened.console.say(f"{what}, these become stale: {', '.join(after[:4])}{more}")


def evaluate(opened: ActiveRun, policy: int | None, force: bool) -> int:
    """`grpo evaluate` of a policy of a run, by default the newest: made where it is missing; which it is.

    Raises InputError (exit 4) where the policy is not there, or was measured otherwise than configured and
    not `force`.
    """
    evaluation.config_of(opened)  # or there is nothing to do it with
    newest = newest_policy(opened)
    number = newest if policy is None else policy
    if not 0 <= number <= max(opened.iterations(), default=-1) + 1:
        raise UsageError(f"--policy {number}: run {opened.name} has policies 0 to {newest}")
    before = opened.manifest(evaluation.OUTPUT, number)
    if before is not None:
        _check_replace(opened, EVALUATE, before, force, only_failed=False)
    if force:
        _say_stale(opened, EVALUATE, [number])
    with Resources(opened) as resources:
        if force or before is None or not evaluation.plan(opened, number).same_as(before):
            EVALUATE.load().check(opened, number, resources.borrow)
        perform(opened, EVALUATE, number, resources, force)
    return number


def checkpoint_run(opened: ActiveRun, checkpoint: str) -> ActiveRun:
    """A run whose policy 0 is a checkpoint of any origin, to measure it as those of `opened` are.

    It is named by all it depends on, so that a killed evaluation is gone on with, and removed when it is
    done. Raises UsageError (exit 2) without `evaluate`.
    """
    path = Path(checkpoint) if Path(checkpoint).exists() else resolve_model(opened, checkpoint)
    model, config = str(path.absolute()), opened.config
    changes = {
        "model": model,
        "prompts": evaluation.config_of(opened).prompts,
        "update": config.update.model_copy(update={"reference": None}),
        "artifacts": ArtifactsConfig(),  # it is removed when it is done
    }
    values = config.model_copy(update=changes)
    name = digest([values.model_dump(), opened.checkpoint_id(model)])[:16]
    root = opened.root / ".eval"
    return ActiveRun(root, values.model_copy(update={"run": name}), opened.imports, opened.console)


def _failed_iterations(opened: ActiveRun, stage: Stage, wanted: str) -> list[int]:
    """Of the iterations asked for, or of all, those in which rewards failed."""
    numbers = _iterations(opened, stage, wanted or "all")
    if wanted and wanted != "all":
        for number in numbers:
            opened.require(stage.output, number, f"grpo {stage.name} --iteration {number}")
    manifests = {number: opened.manifest(stage.output, number) for number in numbers}
    return [number for number, found in manifests.items() if found and found.summary["failed"]]


def _check_kept(opened: ActiveRun, stage: Stage, before: Manifest) -> None:
    """Raise InputError (exit 4) where rows would be kept that would not be made in the same way now."""
    place = opened.folder(stage.output, before.iteration)
    again = f"`grpo {stage.name} --iteration {before.iteration}"
    if states.inputs_changed(opened, before):
        raise InputError(f"{place}: stale, so no row of it can be kept; rerun it with {again}`")
    changes = states.differences_of(opened, stage, before)
    # A time-out is no part of any value, and a longer one is why it is tried again; what one counts neither.
    kept = (".timeout_s: ", ".on_timeout: ")
    if others := [change for change in changes if not any(key in change for key in kept)]:
        raise InputError(
            f"{place}: changed ({'; '.join(others)}), so --only-failed cannot keep the other rows;"
            f" {again} --force` reruns it"
        )


def _iterations(opened: ActiveRun, stage: Stage, wanted: str) -> list[int]:
    """Iterations of `--iteration`: a number, a range, `all`, or the earliest that can be done and is not."""
    have = opened.iterations()
    if wanted:
        bounds = parse_iterations(wanted)
        if bounds is None:
            return have
        first, last = bounds
        if last > (have[-1] + 1 if have else 0):
            raise UsageError(f"--iteration {wanted}: run {opened.name} has {_range(opened)}")
        return list(range(first, last + 1))
    present = states.states(opened)
    following = have[-1] + 1 if have else 0
    for iteration in [*have, *([following] if following < opened.config.iterations else [])]:
        state = present[iteration][stage.name].name if iteration in present else "missing"
        if state in ("missing", "partial", "stale") and _can_plan(opened, stage, iteration):
            return [iteration]
    return []


def _can_plan(opened: ActiveRun, stage: Stage, iteration: int) -> bool:
    try:
        stage.plan(opened, iteration)
    except InputError:
        return False
    return True


def _range(opened: Run) -> str:
    have = opened.iterations()
    return iterations_text(have) if have else "no iteration yet"


def show_configuration(opened: ActiveRun) -> None:
    """Print every value, with what a null stands for where that is another value."""
    document = opened.config.model_dump()
    if opened.config.evaluate is not None:
        document["evaluate"] |= evaluation.settings(opened)
    if document["update"]["reference"] is None and opened.config.update.kl_coefficient:
        document["update"]["reference"] = opened.config.model
    if opened.console.quiet:
        print(json.dumps(document, indent=1))
        return
    values = flatten(document)
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:<{width}}  {json.dumps(value)}")


def say_state(opened: ActiveRun, until: int) -> None:
    """Say what a run would begin with; InputError (exit 4) where it would not go on with what is there."""
    done = 0
    if (opened.path / "run.json").exists() or lacks_run_json(opened.path):
        runner.say_differences(opened, until)
        done = sum(1 for number in opened.iterations() if opened.manifest("update", number))
    opened.console.say(f"{done} of {opened.config.iterations} iterations are complete")
