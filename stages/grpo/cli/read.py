"""cli.read: the commands that look at what is there. They take no lock and change nothing."""

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.entry import app
from grpo.cli.opening import CONFIG, ConfigOption, JsonOption, RunArgument, SetOption, print_json, reading


@app.command()
def status(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    every: Annotated[bool, typer.Option("--all", help="Every iteration, not only the last.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Iterations x stages: done, partial, stale, differs, missing; reward, KL, length, seconds."""
    from grpo import status as status_module

    opened = reading(name, config, set_)
    if as_json:
        print_json(status_module.describe(opened))
    else:
        status_module.print_status(opened, every)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="A query; none: an interactive prompt.")] = "",
    config: ConfigOption = CONFIG,
    names: Annotated[list[str], typer.Option("--run", help="A run to open; may be given again.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write to a .parquet, .csv or .json file.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds a query may take.")] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Read-only SQL over the tables of runs, and over samples, timings and manifests."""
    from grpo import query as query_module

    runs = [reading(name, config, []) for name in dict.fromkeys(names or [""])]
    query_module.answer(runs, query, out, timeout_s, as_json)


@app.command()
def show(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    iteration: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over samples.")] = None,
    groups: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 3,
    as_json: JsonOption = False,
) -> None:
    """Read rollouts as a person: prompt, its K responses, rewards, advantages."""
    from grpo import show as show_module

    rows = show_module.fetch(reading(name, config, []), iteration, where, groups)
    if as_json:
        print_json(rows)
    else:
        show_module.print_rollouts(rows)


@app.command()
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs; default: that of the configuration.")
    ] = None,
    config: ConfigOption = CONFIG,
    out: Annotated[Path | None, typer.Option(help="Default: RUN.html, report.html for several runs.")] = None,
    png: Annotated[bool, typer.Option("--png", help="The curves as a picture, RUN.png.")] = False,
    rollouts: Annotated[int | None, typer.Option(help="At most so many to read; default: what fits.")] = None,
    as_json: JsonOption = False,
) -> None:
    """One HTML file to read and to send: curves, pass rate by prompt, every rollout; runs overlaid."""
    from grpo import report as report_module

    runs = [reading(name, config, []) for name in dict.fromkeys(names or [""])]
    result = report_module.write(runs, out, png, rollouts)
    if as_json:
        print_json(result)
