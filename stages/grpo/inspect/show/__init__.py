"""show: rollouts as a person reads them: groups of an iteration, tokens, one prompt as training goes on."""

import json
from dataclasses import fields
from functools import partial

from grpo.artifacts import ActiveRun
from grpo.console import paged
from grpo.errors import UsageError
from grpo.inspect.show import choice, page
from grpo.inspect.show.choice import Draw, Opened, Options

__all__ = ["Options", "show"]
_LOOKS = ("side_by_side", "tokens", "reward")  # options of how a group is shown
_View = tuple[list[Draw], partial[None], str]  # what is shown, how, and the line below it


def show(run: ActiveRun, options: Options, opened: Opened) -> None:
    """`grpo show`. `opened` opens the other run of `--against`.

    Raises UsageError (exit 2) for what is not there, or does not go together.
    """
    if options.against:
        _refuse(options, "--against", ("group", "sample", *_LOOKS))
        draws, printed, footer = _against(run, options, opened)
    elif options.prompt is not None and options.iteration is None:
        without_use = ("where", "timeout_s", "group", "sample", "sort", "reverse", "groups", "page", *_LOOKS)
        _refuse(options, "--prompt without --iteration", without_use)
        draws, footer = choice.every_draw_of(run, options.prompt), ""
        printed = partial(page.print_over_time, draws=draws)
    else:
        if options.tokens:
            _refuse(options, "--tokens", ("side_by_side", "reward"))
        draws, printed, footer = _groups(run, options)
    if options.as_json:
        rows = [row for draw in draws for row in draw]
        print(json.dumps(rows, indent=1, allow_nan=False, default=str))
        return
    with paged(options.pager) as console:
        printed(console)
        if footer:
            console.print(footer, style="dim")


def _refuse(options: Options, what: str, without_use: tuple[str, ...]) -> None:
    """Raise UsageError for an option that would change nothing of what is shown."""
    for field in fields(options):
        if field.name in without_use and getattr(options, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise UsageError(f"--{option}: changes nothing of what {what} shows; leave one of them out")


def _groups(run: ActiveRun, options: Options) -> _View:
    iteration = choice.chosen_iteration(run, options.iteration)
    known = choice.rewards_of(run, iteration)
    for name in options.reward:
        if name not in known:
            raise UsageError(f"--reward {name}: iteration {iteration} has {', '.join(known) or 'no rewards'}")
    shown, footer = choice.turned(choice.ordered(run, iteration, options), options, "groups")
    draws = choice.draws_of(run, iteration, shown)
    if options.tokens:
        choice.add_tokens(run, iteration, draws)
        return draws, partial(page.print_tokens, draws=draws), footer
    rewards = options.reward or (known if len(known) > 1 else ())
    printed = page.print_columns if options.side_by_side else page.print_tables
    return draws, partial(printed, draws=draws, rewards=rewards), footer


def _against(run: ActiveRun, options: Options, opened: Opened) -> _View:
    iteration = choice.chosen_iteration(run, options.iteration)
    other, at = choice.moment(run, iteration, options.against, opened)
    draws = choice.draws_of(run, iteration, choice.ordered(run, iteration, options))
    others = choice.draws_of(other, at, choice.ordered(other, at, Options()))
    pairs = choice.pairs_of(draws, others)
    if draws and not pairs:
        raise UsageError(
            f"--against {options.against}: iteration {iteration} and iteration {at} drew none of these"
            " prompts both; --prompt ID shows one over all iterations"
        )
    shown, footer = choice.turned(pairs, options, "prompts")
    return [draw for pair in shown for draw in pair], partial(page.print_pairs, pairs=shown), footer
