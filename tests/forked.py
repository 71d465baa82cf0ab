"""forked: workers forked from a process that has imported what they need: a tenth of a second, not five.

That process has no threads, so that a fork is safe; a worker gets the environment of who wants it. Where the
start of a worker, what it prints or whose child it is matters, a folder's own `forked_workers` leaves them as
the product has them (tests/execute/conftest.py).
"""

import multiprocessing.context as contexts
import os
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest

IMPORTED = [
    "pytest",  # of `python -m pytest`, whose main module each worker imports
    "pebble",
    "grpo.cli",
    "grpo.generate.engines.transformers_engine",
    "grpo.generate.stage",
    "grpo.generate.worker",
    "grpo.pipeline.runner",
    "grpo.score.functions.worker",
    "grpo.score.stage",
    "grpo.sql.child",
    "grpo.update.follower",
    "grpo.update.learner",
    "grpo.update.stage",
    "transformers.models.qwen3.modeling_qwen3",
]


class Process(contexts.ForkServerProcess):
    """With the environment of now."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._environment = dict(os.environ)

    def start(self) -> None:
        """Begin it."""
        begin()
        super().start()

    def run(self) -> None:
        """As its target has it."""
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Context(contexts.ForkServerContext):
    """What multiprocessing.get_context() gives."""

    Process = Process


CONTEXT = Context()
_SERVER: Any = vars(forkserver)["_forkserver"]


def begin() -> None:
    """Have the server running: what is forked from this process then shares it."""
    forkserver.set_forkserver_preload(IMPORTED)
    _SERVER.ensure_running()


def _shares_it() -> None:
    """In a fork: the server is no child of this process, so it cannot be asked whether it runs."""
    if _SERVER._forkserver_pid is not None:
        _SERVER.ensure_running = resource_tracker.ensure_running


os.register_at_fork(after_in_child=_shares_it)


def start_sql(self: Any) -> None:
    """In place of UserSql._start()."""
    from grpo.sql import child

    self._folder = tempfile.TemporaryDirectory(prefix="grpo-sql-", ignore_cleanup_errors=True)
    self._pipe, end = CONTEXT.Pipe()
    with end:
        log = str(Path(self._folder.name, "stderr"))
        self._forked = CONTEXT.Process(target=child.begin, args=(end, self._folder.name, log))
        self._forked.start()
        self._pid = self._forked.pid


def sql_exit_code(self: Any) -> int | None:
    """In place of UserSql._exit_code(): only the server can wait for what it forked."""
    self._pid, self._ready = None, False
    self._pipe.close()
    self._forked.join()
    code: int | None = self._forked.exitcode
    return code


@pytest.fixture(autouse=True, scope="module")
def forked_workers() -> Iterator[None]:
    """Engines, processes of the learner, reward functions and users' SQL have them; chat templates, with a
    limit of address space, do not."""

    def get_context(method: str) -> Context:
        assert method == "spawn"
        return CONTEXT

    with pytest.MonkeyPatch.context() as patch:
        for place in ("execute.processes", "score.functions.pool"):
            patch.setattr(f"grpo.{place}.get_context", get_context)
        patch.setattr("grpo.sql.guarded.UserSql._start", start_sql)
        patch.setattr("grpo.sql.guarded.UserSql._exit_code", sql_exit_code)
        yield
