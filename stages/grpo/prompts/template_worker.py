"""template_worker: chat templates at work, in a process with limits: others wrote them, one may never end.

The clock it shows is UTC's and its randomness has a seed, so that a machine's time zone and chance are no
part of a prompt. What it raises comes back as text.
"""

import faulthandler
import os
import random
import re
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from grpo.errors import first_line
from grpo.prompts.columns import MAX_CHARACTERS

_SPARE_S = 2.0  # then the process is ended: within one long operation, Python hears no alarm
MEMORY_GIB = 2  # address space; what is imported takes a tenth of it
_SURROGATE = re.compile("[\ud800-\udfff]")


class Request(NamedTuple):
    """One chat to be rendered, and what the template is given for it."""

    messages: list[dict[str, Any]]
    arguments: Mapping[str, Any]


class Failure(NamedTuple):
    """What the template did instead of giving text: it raised something, or ran into a limit.

    among: of how many requests it is one, where it is not known which.
    """

    reason: str
    at_limit: bool = False
    among: int = 1


def start() -> None:
    """Prepare the process. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as reward workers (score/functions/worker.py)
    signal.signal(signal.SIGALRM, _alarm)
    os.environ["TZ"] = "UTC"
    time.tzset()
    limit = MEMORY_GIB * 2**30
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    soft = limit if most == resource.RLIM_INFINITY else min(limit, most)
    with suppress(ValueError):  # macOS keeps no such limit; that of time is left
        resource.setrlimit(resource.RLIMIT_AS, (soft, most))


def render(template: str, requests: Sequence[Request], timeout_s: float) -> list[str | Failure]:
    """The text of each request or why it has none, each within timeout_s; one at a limit is the last."""
    found: list[str | Failure] = []
    with Path(os.devnull).open("w") as nowhere:
        for request in requests:
            faulthandler.dump_traceback_later(timeout_s + _SPARE_S, exit=True, file=nowhere)
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            try:
                found.append(_text(template, request))
            except TimeoutError:
                found.append(Failure(f"it takes more than {timeout_s:g} s", at_limit=True))
            except MemoryError:
                found.append(Failure(f"it takes more than {MEMORY_GIB} GiB of memory", at_limit=True))
            except Exception as error:  # noqa: BLE001 - a template can raise whatever code can
                found.append(Failure(first_line(error)))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
            if isinstance(found[-1], Failure) and found[-1].at_limit:
                break
    return found


def _text(template: str, request: Request) -> str:
    random.seed(0)  # anew, so that no prompt depends on those before it
    call: Any = render_jinja_template  # its annotation says that it returns one text
    [text], _ = call([request.messages], chat_template=template, **request.arguments)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters; {MAX_CHARACTERS:,} are the most")
    if not text.isascii() and _SURROGATE.search(text):  # as "\ud800" is in a template
        raise ValueError("it writes a lone surrogate (\\ud800-\\udfff), which is not text")
    return str(text)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TimeoutError
