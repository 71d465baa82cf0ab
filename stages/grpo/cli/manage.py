"""cli.manage: the commands that look after machine and runs: check, verify, clean up, fork."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from grpo.cli import lazy, options, ranks
from grpo.errors import UsageError

if TYPE_CHECKING:
    from grpo.artifacts import ActiveRun
    from grpo.mirror.check import MirrorReport


def doctor(
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    model: Annotated[bool, typer.Option("--model", help="Compare the engine with the learner.")] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Try the runs' file system from two machines.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Check that this machine can run the configuration; creates no run."""
    if shared and model:
        raise UsageError("--shared and --model cannot be combined")
    if shared:
        _shared(lazy.opening.configured(config, set_, as_json), as_json)
    report = lazy.doctor.examine(lazy.opening.configured(config, set_, as_json), model)
    options.answer(as_json, report.describe(), lambda: lazy.doctor.print_report(report))
    raise typer.Exit(report.exit_code)


def _shared(run: "ActiveRun", as_json: bool) -> NoReturn:
    report, leads = lazy.shared.examine_shared(run)

    def show() -> None:
        if leads:
            lazy.doctor.print_report(report)
        else:
            run.console.say("doctor: this is the second one; the other one shows what was found")

    options.answer(as_json, report.describe(), show)
    raise typer.Exit(report.exit_code)


def verify(
    name: options.Name = "",
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    discard: Annotated[bool, typer.Option("--discard", help="Move what is damaged to .trash.")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="Recompute every update and compare.")] = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Read the copies in artifacts.mirror too.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Check every hash, schema and invariant of a run; say what is damaged and how to repair it."""
    opened = ranks.joined(options.reading(name, config, set_, damaged=True))
    # What a crash cut off is not finished first: that may be what is damaged.
    with opened.lock(opened.console, linked=True) if discard else nullcontext():
        report = lazy.verify.verify(opened, discard)
    document = {"run": opened.name, **report.describe()}
    exit_code = report.exit_code
    again = None
    if replay:
        again = lazy.verify_replay.not_replayed() if exit_code else lazy.verify_replay.replay(opened)
        exit_code = exit_code or again.exit_code
        document |= {"replay": again.describe(), "exit": exit_code}
    copies = _copies(opened, discard) if mirror else None
    if copies is not None:
        exit_code = exit_code or copies.exit_code
        document |= {"mirror": copies.describe(), "exit": exit_code}

    def show() -> None:
        lazy.verify.print_report(opened, report, discard)
        if again is not None:
            lazy.verify_replay.print_replay(again)
        if copies is not None:
            lazy.check.print_mirror(copies, discard)

    options.answer(as_json, document, show)
    raise typer.Exit(exit_code)


def _copies(run: "ActiveRun", discard: bool) -> "MirrorReport":
    """What is in the mirror of a run; discard: and damaged copies replaced."""
    report = lazy.check.examine(run)
    if discard and report.again:
        lazy.check.copy_again(run, report)
    return report


def gc(
    name: options.Name = "",
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option(help="List without removing.")] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Keep the newest checkpoint only.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Remove the trash, abandoned staging and weights, and checkpoints no longer kept."""
    opened = options.reading(name, config, set_)
    keep_last = 1 if checkpoints else None
    with nullcontext() if dry_run else lazy.opening.locked(opened):
        found = lazy.gc.garbage(opened, keep_last) if dry_run else lazy.gc.collect(opened, keep_last)
    document = {**found, "dry_run": dry_run}
    options.answer(as_json, document, lambda: lazy.gc.print_garbage(found, opened, dry_run))


def restore(
    address: Annotated[str, typer.Argument(help="s3://bucket/prefix/run, as artifacts.mirror has it.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: artifacts/RUN.")] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch a mirrored run, or what is missing of it here; every file is checked."""
    console = lazy.console.Console(as_json)
    found = lazy.restore.restore(address, out, lazy.artifacts.ARTIFACTS, console)
    size = f"{found['outputs']} outputs, {found['files']} files ({found['bytes'] / 2**20:,.1f} MiB)"
    console.say(
        f"run {found['run']}: {size} restored to {found['folder']}; next: grpo verify {found['folder']}"
    )
    options.answer(as_json, found)


def init(
    folder: Annotated[Path, typer.Argument(help="Folder, created if missing (default: here).")] = Path(),
    as_json: options.Json = False,
) -> None:
    """Create a starter project: pipeline.yaml, reward.py with its test, prompts.jsonl."""
    paths = lazy.init.create(folder)
    there = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    made = f"made {', '.join(map(str, paths))}; next: {there}grpo run"
    document = {"folder": str(folder), "files": [path.name for path in paths]}
    options.answer(as_json, document, lambda: typer.echo(made, err=True))


def export(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    name: options.Name = "",
    policy: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best policy measured, by stop.metric.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 (as trained), bfloat16 or float16.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Only what LoRA trained.")] = False,
    push: Annotated[str | None, typer.Option(help="Also upload to owner/name on the hub.")] = None,
    config: options.Config = options.CONFIG,
    accept_replay: options.AcceptReplay = False,
    as_json: options.Json = False,
) -> None:
    """Write a policy as a plain Hugging Face directory with a model card."""
    if push is not None:
        lazy.export.check_repository(push)
    if best and policy is not None:
        raise UsageError(f"--best and --policy {policy} name a policy each; give one of them")
    opened = options.reading(name, config)
    opened.accept_replay = accept_replay
    if best:
        policy = (found := lazy.artifacts.require_best(opened)).policy
        opened.console.say(f"best: policy {policy}, {found.value:.3f} {found.measure}")
    result = lazy.export.export(opened, policy, out, dtype, adapter)
    size = f"{result['bytes'] / 2**20:,.1f} MiB"
    opened.console.say(f"policy {result['policy']} of run {opened.name}: {size} in {out}")
    if push is not None:
        result["url"] = lazy.export.push(out, push)
        opened.console.say(f"uploaded to {result['url']}")
    options.answer(as_json, result)


def fork(
    source: Annotated[str, typer.Argument(help="Run to start from.")],
    new: Annotated[str, typer.Argument(help="Name of the new run.")],
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    iteration: Annotated[int | None, typer.Option(help="Its first own; default: the next.")] = None,
    as_json: options.Json = False,
) -> None:
    """Start a run from the first iterations of another, shared by hard links."""
    forked = lazy.opening.configured(config, [*set_, f"run={new}"], as_json)
    result = lazy.fork.fork(options.reading(source, config), forked, iteration)
    forked.console.say(f"{lazy.fork.describe(source, new, result)}; next: grpo run {new}")
    options.answer(as_json, {"run": new, "from": source, **result})
