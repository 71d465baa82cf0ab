"""cli.manage: the commands that look after machine and runs: check, verify, clean up, fork."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli import lazy
from grpo.cli.options import (
    CONFIG,
    ConfigOption,
    JsonOption,
    RunArgument,
    SetOption,
    configured,
    locked,
    print_json,
    reading,
)
from grpo.errors import UsageError


def doctor(
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    model: Annotated[
        bool, typer.Option("--model", help="Open the engine and compare it with the learner.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that this machine can run the configuration; creates no run."""
    report = lazy.doctor.examine(configured(config, set_, as_json), model)
    if as_json:
        print_json(report.describe())
    else:
        lazy.doctor.print_report(report)
    raise typer.Exit(report.exit_code)


def verify(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    discard: Annotated[bool, typer.Option("--discard", help="Move what is damaged to .trash.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every hash, schema and invariant of a run; say what is damaged and how to repair it."""
    opened = reading(name, config, set_, damaged=True)
    # What a crash cut off is not finished first: that may be what is damaged.
    with opened.lock() if discard else nullcontext():
        report = lazy.verify.verify(opened, discard)
    if as_json:
        print_json({"run": opened.name, **report.describe()})
    else:
        lazy.verify.print_report(opened, report, discard)
    raise typer.Exit(report.exit_code)


def gc(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option(help="List without removing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the trash, abandoned staging, and checkpoints no longer kept."""
    opened = reading(name, config, set_)
    with nullcontext() if dry_run else locked(opened):
        found = lazy.gc.garbage(opened) if dry_run else lazy.gc.collect(opened)
    if as_json:
        print_json({**found, "dry_run": dry_run})
    else:
        lazy.gc.print_garbage(found, opened, dry_run)


def init(
    folder: Annotated[Path, typer.Argument(help="Folder, created if missing (default: here).")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Create a starter project: pipeline.yaml, reward.py with its test, prompts.jsonl."""
    paths = lazy.init.create(folder)
    if as_json:
        print_json({"folder": str(folder), "files": [path.name for path in paths]})
    else:
        there = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
        typer.echo(f"made {', '.join(map(str, paths))}; next: {there}grpo run", err=True)


def export(
    name: RunArgument = "",
    out: Annotated[Path | None, typer.Option(help="The folder to write; required.")] = None,
    policy: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (as trained), bfloat16 or float16.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Only what LoRA trained.")] = False,
    push: Annotated[str | None, typer.Option(help="Also upload to owner/name on the hub.")] = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Write a policy as a plain Hugging Face directory with a model card."""
    if out is None:
        raise UsageError("--out: is required: the folder to write")
    if push is not None:
        lazy.export.check_repository(push)
    opened = reading(name, config, [])
    result = lazy.export.export(opened, policy, out, dtype, adapter)
    size = f"{result['bytes'] / 2**20:,.1f} MiB"
    opened.console.say(f"policy {result['policy']} of run {opened.name}: {size} in {out}")
    if push is not None:
        result["url"] = lazy.export.push(out, push)
        opened.console.say(f"uploaded to {result['url']}")
    if as_json:
        print_json(result)


def fork(
    source: Annotated[str, typer.Argument(help="Run to start from.")],
    new: Annotated[str, typer.Argument(help="Name of the new run.")],
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    iteration: Annotated[
        int | None, typer.Option(help="First iteration of the fork's own (default: the next).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a run from the first iterations of another, shared by hard links."""
    forked = configured(config, [*set_, f"run={new}"], as_json)
    result = lazy.fork.fork(reading(source, config, []), forked, iteration)
    if as_json:
        print_json({"run": new, "from": source, **result})
    else:
        options = shlex.join(part for text in [*set_, f"run={new}"] for part in ("--set", text))
        forked.console.say(f"{lazy.fork.describe(source, new, result)}; next: grpo run {options}")
