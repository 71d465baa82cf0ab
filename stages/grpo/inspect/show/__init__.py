"""show: rollouts as a person reads them: groups of an iteration, tokens, one prompt as training goes on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo.artifacts import ActiveRun, Run
from grpo.console import paged
from grpo.errors import UsageError
from grpo.inspect.show import choice as choosing
from grpo.inspect.show import groups, prompt, tokens
from grpo.inspect.show.choice import Choice, Page, Row

__all__ = ["Choice", "Look", "show"]
_LOOKS = ("side_by_side", "tokens", "reward")  # options of how a group is shown


@dataclass(frozen=True)
class Look:
    """The options of `grpo show` that say how rollouts are shown."""

    reward: list[str]
    """Names of the rewards to show by part; none: all, where there are several."""
    side_by_side: bool = False
    tokens: bool = False
    pager: bool = True
    as_json: bool = False


def show(
    run: ActiveRun, choice: Choice, look: Look, against: str, opened: Callable[[str], ActiveRun]
) -> None:
    """`grpo show`. `opened` opens the other run of `--against`.

    Raises UsageError (exit 2) for what is not there, or does not go together.
    """
    if against:
        _refuse(choice, look, "--against", ("group", "sample", *_LOOKS))
        _show_against(run, choice, look, against, opened)
    elif choice.prompt is not None and choice.iteration is None:
        options = ("where", "group", "sample", "sort", "reverse", "groups", "page")
        _refuse(choice, look, "--prompt without --iteration", (*options, *_LOOKS))
        _show_over_time(run, choice.prompt, look)
    else:
        if look.tokens:
            _refuse(choice, look, "--tokens", ("side_by_side", "reward"))
        _show_groups(run, choice, look)


def _refuse(choice: Choice, look: Look, what: str, options: tuple[str, ...]) -> None:
    """Raise UsageError for an option that would change nothing of what is shown."""
    given, usual = {**vars(choice), **vars(look)}, {**vars(Choice()), **vars(Look([]))}
    without_use = [name for name in options if given[name] != usual[name]]
    if without_use:
        option = without_use[0].replace("_", "-")
        raise UsageError(f"--{option}: changes nothing of what {what} shows; leave one of them out")


def _show_groups(run: ActiveRun, choice: Choice, look: Look) -> None:
    iteration = choosing.chosen_iteration(run, choice.iteration)
    rewards = _rewards(run, iteration, look.reward)
    order = choosing.ordered(run, iteration, choice)
    chosen, page = choosing.turned(list(order), choice)
    rows = choosing.fetch(run, iteration, {group: order[group] for group in chosen})
    if look.tokens:
        rows = tokens.add_tokens(run, iteration, rows)
    if look.as_json:
        _print_json(rows)
        return
    with paged(look.pager) as console:
        if look.tokens:
            tokens.print_tokens(console, rows)
        else:
            groups.print_groups(console, rows, rewards, look.side_by_side)
        _print_footer(console, page)


def _show_against(
    run: ActiveRun, choice: Choice, look: Look, against: str, opened: Callable[[str], ActiveRun]
) -> None:
    iteration = choosing.chosen_iteration(run, choice.iteration)
    other, other_iteration = prompt.moment(run, iteration, against, opened)
    other_iteration = choosing.chosen_iteration(other, other_iteration, f"--against {against}")
    rows = choosing.fetch(run, iteration, choosing.ordered(run, iteration, choice))
    others = choosing.fetch(other, other_iteration, choosing.ordered(other, other_iteration, Choice()))
    pairs = prompt.pairs_of(rows, others)
    if rows and not pairs:
        raise UsageError(
            f"--against {against}: iteration {iteration} and iteration {other_iteration} drew none of these"
            " prompts both; --prompt ID shows one over all iterations"
        )
    shown, page = choosing.turned(pairs, choice, "prompts")
    if look.as_json:
        _print_json([row for pair in shown for draw in pair for row in draw])
        return
    with paged(look.pager) as console:
        for left, right in shown:
            prompt.print_pair(console, left, right)
        _print_footer(console, page)


def _show_over_time(run: ActiveRun, prompt_id: int, look: Look) -> None:
    draws = prompt.draws_of(run, prompt_id)
    if look.as_json:
        _print_json([row for draw in draws for row in draw])
        return
    with paged(look.pager) as console:
        prompt.print_over_time(console, draws)


def _rewards(run: Run, iteration: int, wanted: list[str]) -> list[str]:
    """Names of the rewards to show by part: those asked for, else all where there are several."""
    known = choosing.rewards_of(run, iteration)
    for name in wanted:
        if name not in known:
            raise UsageError(f"--reward {name}: iteration {iteration} has {', '.join(known) or 'no rewards'}")
    return wanted or (known if len(known) > 1 else [])


def _print_footer(console: Any, page: Page) -> None:
    if not page.total:
        console.print("no rollout meets the condition", style="dim")
    elif page.footer():
        console.print(page.footer(), style="dim", highlight=False)


def _print_json(rows: list[Row]) -> None:
    print(json.dumps(rows, indent=1, allow_nan=False, default=str))
