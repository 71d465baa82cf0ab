"""cli.inspect: the commands that look at runs. They take no lock and change nothing."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli import lazy, options


def status(
    name: options.Name = "",
    config: options.Config = options.CONFIG,
    set_: options.Set = [],  # noqa: B006
    every: Annotated[bool, typer.Option("--all", help="Every iteration, not only the last.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show iterations x stages: done, partial, stale, changed, missing; reward, KL, length, seconds."""
    names = lazy.artifacts.find_runs(name) if name else [""]
    found = [lazy.status.describe(options.reading(each, config, set_)) for each in names]
    document = found[0] if names == [name] else {"runs": found}
    options.answer(as_json, document, lambda: lazy.status.print_all(found, every))


def sql(
    query: Annotated[str, typer.Argument(help="A query; none: read from stdin, or a prompt.")] = "",
    config: options.Config = options.CONFIG,
    names: Annotated[list[str], typer.Option("--run", help="A run to open, or s3://...; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write to a .parquet, .csv or .json file.")] = None,
    timeout_s: options.Timeout = options.TIMEOUT_S,
    as_json: options.Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on stdout.")] = False,
) -> None:
    """Query runs with read-only SQL: tables, samples, iterations, timings, manifests."""
    with lazy.fetch.fetched(names, query) if any(map(_is_remote, names)) else nullcontext(names) as here:
        lazy.query.answer(options.reading_all(here, config), query, out, timeout_s, as_json, as_csv)


def _is_remote(name: str) -> bool:
    return name.startswith("s3://")


def show(
    name: options.Name = "",
    config: options.Config = options.CONFIG,
    iteration: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over samples.")] = None,
    groups: Annotated[int, typer.Option(help="How many prompts a page has.", min=1)] = 3,
    page: Annotated[int, typer.Option(help="Which page, from 1.", min=1)] = 1,
    group: Annotated[int | None, typer.Option(help="Only this group.")] = None,
    sample: Annotated[int | None, typer.Option(help="Only this sample of each group.")] = None,
    sort: Annotated[str, typer.Option(help="By reward, advantage, tokens, mismatch, spread, a reward.")] = "",
    reverse: Annotated[bool, typer.Option("--reverse", help="With --sort: smallest first.")] = False,
    reward: Annotated[list[str], typer.Option(help="A reward to show separately; repeatable.")] = [],  # noqa: B006
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Responses in columns.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Shade tokens by their probability.")] = False,
    against: Annotated[str, typer.Option(help="The same prompts at iteration 40, in a RUN, or RUN:40.")] = "",
    prompt: Annotated[int | None, typer.Option(help="One prompt_id, over all iterations.")] = None,
    timeout_s: options.Timeout = options.TIMEOUT_S,
    no_pager: Annotated[bool, typer.Option("--no-pager", help="Print all at once.")] = False,
    as_json: options.Json = False,
) -> None:
    """Read rollouts: a prompt, its K responses, rewards and advantages; or one prompt over time."""
    chosen = lazy.show.Options(
        iteration=iteration,
        where=where,
        prompt=prompt,
        group=group,
        sample=sample,
        sort=sort,
        reverse=reverse,
        groups=groups,
        page=page,
        reward=tuple(reward),
        side_by_side=side_by_side,
        tokens=tokens,
        against=against,
        pager=not no_pager,
        as_json=as_json,
        timeout_s=timeout_s,
    )
    lazy.show.show(options.reading(name, config), chosen, lambda other: options.reading(other, config))


def compare(
    things: Annotated[list[str], typer.Argument(help="Two rewards (`reward` is their sum), or runs.")],
    config: options.Config = options.CONFIG,
    run: Annotated[str, typer.Option("--run", help="When comparing rewards: the run they belong to.")] = "",
    iteration: Annotated[str, typer.Option(help="3, 0-19 or all.")] = "all",
    examples: Annotated[int, typer.Option(help="With two rewards: how many groups to show.", min=0)] = 3,
    as_json: options.Json = False,
) -> None:
    """Compare two rewards over the same rollouts, or two runs or more."""
    opened = lambda name: options.reading(name, config)  # noqa: E731
    result = lazy.compare.describe(things, run, opened, iteration, examples)
    options.answer(as_json, result, lambda: lazy.compare.print_comparison(result))


def report(
    names: Annotated[list[str], typer.Argument(help="Runs; default: that of the configuration.")] = [],  # noqa: B006
    config: options.Config = options.CONFIG,
    out: Annotated[Path | None, typer.Option(help="Default: RUN.html, report.html for several runs.")] = None,
    png: Annotated[bool, typer.Option("--png", help="The curves as a picture, RUN.png.")] = False,
    rollouts: Annotated[int | None, typer.Option(help="At most so many; default: as many as fit.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write a self-contained HTML report: curves, pass rate by prompt, every rollout; runs overlaid."""
    options.answer(as_json, lazy.report.write(options.reading_all(names, config), out, png, rollouts))
