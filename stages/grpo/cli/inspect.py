"""cli.inspect: the commands that look at runs. They take no lock and change nothing."""

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli import lazy
from grpo.cli.options import CONFIG, ConfigOption, JsonOption, RunArgument, SetOption, print_json, reading


def status(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    every: Annotated[bool, typer.Option("--all", help="Every iteration, not only the last.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show iterations x stages: done, partial, stale, changed, missing; reward, KL, length, seconds."""
    opened = reading(name, config, set_)
    if as_json:
        print_json(lazy.status.describe(opened))
    else:
        lazy.status.print_status(opened, every)


def sql(
    query: Annotated[str, typer.Argument(help="A query; none: an interactive prompt.")] = "",
    config: ConfigOption = CONFIG,
    names: Annotated[list[str], typer.Option("--run", help="A run to open; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write to a .parquet, .csv or .json file.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds a query may take.")] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Query runs with read-only SQL: tables, samples, iterations, timings, manifests."""
    runs = [reading(name, config, []) for name in dict.fromkeys(names or [""])]
    lazy.query.answer(runs, query, out, timeout_s, as_json)


def show(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    iteration: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over samples.")] = None,
    groups: Annotated[int, typer.Option(help="How many prompts a page has.", min=1)] = 3,
    page: Annotated[int, typer.Option(help="Which page, from 1.", min=1)] = 1,
    group: Annotated[int | None, typer.Option(help="Only this group.")] = None,
    sample: Annotated[int | None, typer.Option(help="Only this sample of each group.")] = None,
    sort: Annotated[
        str, typer.Option(help="Largest first: reward, advantage, tokens, mismatch, spread, or a reward.")
    ] = "",
    reverse: Annotated[bool, typer.Option("--reverse", help="With --sort: smallest first.")] = False,
    reward: Annotated[list[str], typer.Option(help="A reward to show separately; repeatable.")] = [],  # noqa: B006
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Responses in columns.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Shade tokens by their probability.")] = False,
    against: Annotated[str, typer.Option(help="The same prompts at iteration 40, in a RUN, or RUN:40.")] = "",
    prompt: Annotated[int | None, typer.Option(help="One prompt_id, over all iterations.")] = None,
    no_pager: Annotated[bool, typer.Option("--no-pager", help="Print all at once.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read rollouts: a prompt, its K responses, rewards and advantages; or one prompt over time."""
    options = lazy.show.Options(
        *(iteration, where, prompt, group, sample, sort, reverse, groups, page),
        *(tuple(reward), side_by_side, tokens, against, not no_pager, as_json),
    )
    lazy.show.show(reading(name, config, []), options, lambda other: reading(other, config, []))


def compare(
    a: Annotated[str, typer.Argument(help="A reward, or a run; `reward` is the weighted sum.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    config: ConfigOption = CONFIG,
    run: Annotated[str, typer.Option("--run", help="When comparing rewards: the run they belong to.")] = "",
    iteration: Annotated[str, typer.Option(help="3, 0-19 or all.")] = "all",
    examples: Annotated[
        int, typer.Option(help="When comparing rewards: how many groups to show.", min=0)
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Compare two rewards over the same rollouts, or two runs."""
    result = lazy.compare.describe(a, b, run, lambda name: reading(name, config, []), iteration, examples)
    if as_json:
        print_json(result)
    else:
        lazy.compare.print_comparison(result)


def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs; default: that of the configuration.")
    ] = None,
    config: ConfigOption = CONFIG,
    out: Annotated[Path | None, typer.Option(help="Default: RUN.html, report.html for several runs.")] = None,
    png: Annotated[bool, typer.Option("--png", help="The curves as a picture, RUN.png.")] = False,
    rollouts: Annotated[
        int | None, typer.Option(help="Maximum number of rollouts to include (default: as many as fit).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a self-contained HTML report: curves, pass rate by prompt, every rollout; runs overlaid."""
    runs = [reading(name, config, []) for name in dict.fromkeys(names or [""])]
    result = lazy.report.write(runs, out, png, rollouts)
    if as_json:
        print_json(result)
