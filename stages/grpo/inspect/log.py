"""log: the lines that `grpo run` says, and what it sends to a tracker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpo.artifacts import ActiveRun
from grpo.inspect import evaluations, status
from grpo.inspect.track import tracking


@contextmanager
def reporting(run: ActiveRun, until: int) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """What to call when an iteration is complete, and when a policy was evaluated.

    Raises UsageError (exit 2) without the tracker, EngineError (exit 8) where it fails.
    """
    with tracking(run, until) as tracked:

        def iteration(number: int) -> None:
            run.console.say(status.line_of(run, number))
            tracked()

        def policy(number: int) -> None:
            run.console.say(evaluations.line_of(run, number))
            tracked()

        yield iteration, policy
