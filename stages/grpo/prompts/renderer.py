"""renderer: chat templates at work elsewhere: in a process that starts at the first chat, with limits.

Whoever renders somebody's template does it here, whether for a policy or for a reward model: others wrote
it, and it may never end, or take all memory. What the process does is in template_worker.py.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool

from grpo.errors import InputError, ResourceError, first_line
from grpo.prompts import template_worker
from grpo.prompts.template_worker import Failure, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHATS_PER_CALL = 1000
TIMEOUT_S = 10.0  # of a chat; a millisecond is usual
_SPARE_S = 20.0  # of a call beside one chat that is slow
_POLL_S = 0.1  # how soon a signal is heard meanwhile


class Renderer:
    """A process that renders chats; to be closed. stop: called while it is waited for, and may raise."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._pool: ProcessPool | None = None

    def render(
        self, template: str, requests: Iterable[Request], timeout_s: float = TIMEOUT_S
    ) -> Iterator[str | Failure]:
        """The text of each request, or what the template did instead; one at a limit is the last.

        timeout_s: of one chat. Raises ResourceError (exit 7) without a process, and what stop() raises.
        """
        left = iter(requests)
        while some := list(islice(left, _CHATS_PER_CALL)):
            for found in self._call(template, some, timeout_s):
                yield found
                if isinstance(found, Failure) and found.at_limit:
                    return

    def close(self) -> None:
        """End the process, busy or not."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _call(self, template: str, requests: list[Request], timeout_s: float) -> list[str | Failure]:
        if self._pool is None:
            # spawn: a fork of a process that has threads (torch, pyarrow) can deadlock.
            context, start = get_context("spawn"), template_worker.start
            self._pool = ProcessPool(max_workers=1, initializer=start, context=context)
        what, limit = (template, requests, timeout_s), timeout_s + _SPARE_S
        future = self._pool.schedule(template_worker.render, what, timeout=limit)
        while self._pool.active and not future.done():
            wait([future], timeout=_POLL_S)
            self._stop()
        if not future.done():
            raise ResourceError("the process for a chat template cannot be started")
        self._stop()  # a signal to all of a process group ends both
        try:
            found: list[str | Failure] = future.result()
        except TimeoutError:
            return [Failure(f"together they take more than {limit:g} s", True, len(requests))]
        except ProcessExpired as error:
            late = f"it takes more than {timeout_s:g} s, or ends its process (status {error.exitcode})"
            return [Failure(late, True, len(requests))]
        return found


def template_of(tokenizer: "PreTrainedTokenizerBase", given: str | None = None, tools: Any = None) -> str:
    """The chat template in force: the one `given`, or the tokenizer's. Raises InputError (exit 4)."""
    try:
        return str(tokenizer.get_chat_template(given, tools))
    except ValueError as error:  # it has none, or several of which none is the default
        raise InputError(f"the tokenizer's chat template: {first_line(error)}") from None
