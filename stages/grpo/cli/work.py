"""cli.work: the commands that train: a whole run, or one stage of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo.cli import options, ranks
from grpo.cli.lazy import api, artifacts, doctor, evaluations, opening, query, settings, work
from grpo.errors import GrpoError, Interrupted, UsageError

StageIteration = Annotated[str, typer.Option("--iteration", help="3, 0-19 or all; default: the first open.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Rerun even if the output is complete.")]


def run(
    name: options.Name = "",
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006 - typer reads the default, nothing changes it
    sweep: Annotated[list[str], typer.Option(help="A run for each value: --sweep key=v1,v2")] = [],  # noqa: B006
    until: Annotated[int | None, typer.Option(help="Stop when N iterations are complete.")] = None,
    from_: Annotated[int | None, typer.Option("--from", help="Rerun what is stale from N on.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --from: do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show the resolved configuration and what is done.")] = False,
    accept_replay: options.AcceptReplay = False,
    as_json: options.Json = False,
) -> None:
    """Run every iteration, resuming automatically: complete work is never redone."""
    if yes and from_ is None:
        raise UsageError("--yes: only valid together with --from N")
    if sweep:
        if name or from_ is not None:
            raise UsageError("--sweep makes runs of its own; leave the run's name and --from out")
        options.answer(as_json, _sweep(config, set_, sweep, until, dry_run, as_json))
        return
    if dry_run:
        if from_ is not None:
            raise UsageError("--dry-run and --from cannot be combined: --from N lists its changes and asks")
        planned = options.chosen(name, config, set_, as_json)
        work.show_configuration(planned)
        doctor.refuse(planned)
        work.say_state(planned, planned.config.iterations if until is None else until)
        return
    opened = ranks.joined(options.chosen(name, config, set_, as_json), samples=True)
    opened.accept_replay = accept_replay
    options.answer(as_json, api.train(opened, until, from_, yes))


def _sweep(
    config: Path, overrides: list[str], sweeps: list[str], until: int | None, dry_run: bool, quiet: bool
) -> dict[str, Any]:
    """Every run of a sweep, one after the other; one that fails does not keep the others from theirs."""
    points = settings.points(config, overrides, sweeps)
    all_ = (opening.configured(config, point, quiet) for point in points)
    runs = [ranks.joined(each, samples=True) for each in all_]  # all of them can be
    done: list[Any] = []
    failed: list[tuple[str, GrpoError]] = []
    for active, point in zip(runs, points, strict=True):
        active.console.say(f"run {active.name}: {', '.join(point[len(overrides) : -1])}")
        try:
            if dry_run:
                doctor.refuse(active)
            done.append({"run": active.name, "set": point} if dry_run else api.train(active, until))
        except Interrupted:
            raise
        except GrpoError as error:
            active.console.say(f"run {active.name}: {error}")
            failed.append((active.name, error))
    if failed:
        name, first = failed[0]
        raise type(first)(
            f"{len(failed)} of {len(runs)} runs of the sweep failed; the first, {name}: {first}"
        )
    return {"runs": done}


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A run or a checkpoint; none: the configured run.")] = "",
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    policy: Annotated[int | None, typer.Option(help="Of the run; default: the newest.", min=0)] = None,
    force: Annotated[bool, typer.Option("--force", help="Evaluate again even if the result exists.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the responses to a .parquet or .json file.")] = None,
    accept_replay: options.AcceptReplay = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate a policy of the run, or any checkpoint, on the held-out prompts of `evaluate`."""
    name = checkpoint if checkpoint and artifacts.names_run(checkpoint) else ""
    checkpoint = "" if name else checkpoint
    if checkpoint and (policy is not None or force):
        raise UsageError("evaluate: a checkpoint takes neither --policy nor --force")
    if out is not None:
        query.check_out(out, ["rewards"])
    if checkpoint:
        run = work.checkpoint_run(opening.configured(config, set_, as_json), checkpoint)
        with opening.working(run) as opened:
            work.evaluate(opened, None, False)
            what, found = checkpoint, {"checkpoint": opened.config.model}
            found |= evaluations.delivered(opened, 0, out)
            opened.release()
            artifacts.files.remove(opened.path)
    else:
        with opening.working(options.chosen(name, config, set_, as_json)) as opened:
            opened.accept_replay = accept_replay
            policy = work.evaluate(opened, policy, force)
            found = {"run": opened.name, **evaluations.delivered(opened, policy, out)}
            what = f"policy {policy} of run {opened.name}"
    options.answer(as_json, found, lambda: evaluations.print_evaluation(what, found))


def _stage_command(stage: str, summary: str) -> Callable[..., None]:
    def command(
        name: options.Name = "",
        config: options.Config = options.CONFIG,
        set_: options.Set = [],  # noqa: B006
        iteration: StageIteration = "",
        force: ForceOption = False,
        accept_replay: options.AcceptReplay = False,
        as_json: options.Json = False,
    ) -> None:
        with opening.working(ranks.joined(options.chosen(name, config, set_, as_json))) as opened:
            opened.accept_replay = accept_replay
            result = work.run_stage(opened, stage, iteration, force)
        options.answer(as_json, result)

    command.__name__, command.__doc__ = stage, summary
    return command


generate = _stage_command("generate", "Stage 1: policy + prompts -> rollouts.")


def score(
    name: options.Name = "",
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    iteration: StageIteration = "",
    force: ForceOption = False,
    only_failed: Annotated[bool, typer.Option("--only-failed", help="Rerun only rows that failed.")] = False,
    as_json: options.Json = False,
) -> None:
    """Stage 2: rollouts + prompts -> rewards."""
    with opening.working(options.chosen(name, config, set_, as_json)) as opened:
        result = work.run_stage(opened, "score", iteration, force, only_failed)
    options.answer(as_json, result)


advantage = _stage_command("advantage", "Stage 3: rollouts + rewards -> advantages.")
update = _stage_command("update", "Stage 4: policy + rollouts + advantages -> next policy.")
