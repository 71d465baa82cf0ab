"""commands: what a command does once its run is open. The command line itself is in cli/."""

import json
import sys
from typing import Any

from grpo import runner, status
from grpo.artifacts import Manifest, Run
from grpo.config import flatten
from grpo.errors import InputError, UsageError
from grpo.generate.source import BUILT_IN
from grpo.selection import parse_range


def run(opened: Run, until: int | None, from_: int | None, yes: bool) -> dict[str, Any]:
    """`grpo run`: complete iterations, report each, and measure the held-out sums of the built-in task.

    yes: do not ask before `from_` moves anything away.
    """
    until = opened.config.iterations if until is None else until
    if until < 0:
        raise UsageError(f"--until {until}: expected a number of iterations, 0 or more")
    if from_ is not None:
        if not 0 <= from_ <= max(opened.iterations(), default=-1):  # N itself may be what is lost
            raise UsageError(
                f"--from {from_}: run {opened.name} has no iteration {from_}; it has {_range(opened)}"
            )
        if not yes:
            _confirm(opened, from_)
        runner.start_over(opened, from_)
    worked = runner.run_iterations(
        opened, until, lambda iteration: opened.console.say(status.line_of(opened, iteration))
    )
    if not worked:
        opened.console.say(f"run {opened.name}: {until} iterations are complete; nothing to do")
    result = {"run": opened.name, "iterations": until, "worked": worked}
    if opened.config.prompts.source == BUILT_IN and worked:
        result["held_out_accuracy"] = _held_out(opened, until)
    return result


def _confirm(opened: Run, first: int) -> None:
    """Ask before `--from` moves anything. UsageError (exit 2) for no, and where nobody can be asked."""
    later, stages = runner.done_again(opened, first)
    parts = [f"of iteration {first} {', '.join(stage.name for stage in stages)}"] if stages else []
    parts += [f"all of {_iterations_text(later)}"] if later else []
    if not parts:
        return
    text = f"--from {first}: {' and '.join(parts)} will be done again; what is there goes to .trash"
    if not sys.stdin.isatty():
        raise UsageError(f"{text}; give --yes too")
    if not opened.console.confirm(text):
        raise UsageError(f"--from {first}: not confirmed; nothing was moved")


def _held_out(opened: Run, until: int) -> dict[str, float]:
    from grpo.evaluate import held_out_accuracy

    limit = opened.config.generate.max_new_tokens
    found = {
        "before": held_out_accuracy(opened.policy_folder(0), limit),
        "after": held_out_accuracy(opened.policy_folder(until), limit),
    }
    opened.console.say(
        f"held-out sums (never prompted in training), greedy: {found['before']:.2f} before,"
        f" {found['after']:.2f} after {until} iterations"
    )
    return found


def run_stage(opened: Run, name: str, wanted: str, force: bool) -> list[dict[str, Any]]:
    """One stage command over the iterations asked for. Raises InputError (exit 4) for what differs."""
    [stage] = [stage for stage in runner.STAGES if stage.name == name]
    results = []
    iterations = _iterations(opened, stage, wanted)
    if not iterations:
        opened.console.say(f"{name}: nothing to do; --iteration N and --force do it again")
    with runner.Tools(opened) as tools:
        for iteration in iterations:
            before = opened.manifest(stage.output, iteration)
            if before is not None:
                _check_replace(opened, stage, before, force)
            manifest = runner.perform(opened, stage, iteration, tools, force)
            done = before is None or manifest.fingerprint != before.fingerprint
            text = f"{manifest.rows} rows" if done else "nothing to do, it is complete"
            opened.console.say(f"{name} {iteration}: {text}")
            results.append({"iteration": iteration, "done": done, "rows": manifest.rows, "ids": manifest.ids})
    return results


def _check_replace(opened: Run, stage: runner.Stage, before: Manifest, force: bool) -> None:
    """Refuse what differs without --force; with it, say what may become stale."""
    iteration = before.iteration
    assert iteration is not None
    if force:
        after = runner.followers(opened, stage.output, iteration)
        if after:
            more = f" and {len(after) - 4} more" if len(after) > 4 else ""
            listed = ", ".join(after[:4]) + more
            opened.console.say(
                f"{stage.name} {iteration}: if its result changes, these become stale: {listed}"
            )
        return
    if runner.inputs_changed(opened, before):
        return  # stale: it is done again without being asked twice
    if changes := runner.differences_of(opened, stage, before):
        place = opened.folder(stage.output, iteration)
        raise InputError(f"{place}: differs ({'; '.join(changes)}); --force makes it again")


def _iterations(opened: Run, stage: runner.Stage, wanted: str) -> list[int]:
    """Iterations of `--iteration`: a number, a range, `all`, or the earliest that can be done and is not."""
    have = opened.iterations()
    if wanted:
        bounds = parse_range(wanted)
        if bounds is None:
            return have
        first, last = bounds
        if last > (have[-1] + 1 if have else 0):
            raise UsageError(f"--iteration {wanted}: run {opened.name} has {_range(opened)}")
        return list(range(first, last + 1))
    present = runner.states(opened)
    following = have[-1] + 1 if have else 0
    for iteration in [*have, *([following] if following < opened.config.iterations else [])]:
        state = present[iteration][stage.name].name if iteration in present else "missing"
        if state in ("missing", "partial", "stale") and _can_plan(opened, stage, iteration):
            return [iteration]
    return []


def _can_plan(opened: Run, stage: runner.Stage, iteration: int) -> bool:
    try:
        stage.plan(opened, iteration)
    except InputError:
        return False
    return True


def _range(opened: Run) -> str:
    have = opened.iterations()
    return _iterations_text(have) if have else "no iteration yet"


def _iterations_text(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"iteration {first}" if first == last else f"iterations {first} to {last}"


def dry_run(opened: Run) -> None:
    """Print every resolved value, and on stderr what `grpo run` would do."""
    values = flatten(opened.config.model_dump())
    if opened.console.quiet:
        print(json.dumps(opened.config.model_dump(), indent=1))
    else:
        width = max(map(len, values))
        for key, value in values.items():
            print(f"{key:<{width}}  {json.dumps(value)}")
    exists = (opened.path / "run.json").exists() and opened.manifest("policy", None) is not None
    done = sum(1 for n in opened.iterations() if opened.manifest("update", n)) if exists else 0
    opened.console.say(f"{done} of {opened.config.iterations} iterations are complete")
