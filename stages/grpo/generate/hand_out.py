"""hand_out: shards that other processes sample while this one waits, or scores and trains.

A thread takes the answers and commits the shards; it computes nothing. What it needs of a policy is on disk,
or in memory as files, before it begins: whoever trains may change the weights then.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from grpo.artifacts import (
    ActiveRun,
    Staging,
    checkpoint_files,
    files,
    lent_folders,
    lent_prefix,
    same_weights_since,
)
from grpo.errors import Interrupted
from grpo.execute import Checkpoint
from grpo.generate.engine_pool import Engines
from grpo.generate.engines.tail import TAIL, is_tail
from grpo.generate.rollouts import SamplingTask
from grpo.generate.worker import ShardJob, ShardResult
from grpo.models.weight_check import WeightCheck, read_weight_check
from grpo.models.weights import Lend, Weights

if TYPE_CHECKING:
    from grpo.generate.vllm_transfer import Sender

_SHOWN_S = 0.1


class HandOut:
    """The shards `names` of a task, begun."""

    def __init__(
        self,
        run: ActiveRun,
        staging: Staging,
        engines: Engines,
        lend: Lend,
        task: SamplingTask,
        names: list[str],
    ) -> None:
        self._run, self._staging, self._engines = run, staging, engines
        self._table, self._what = task.table, f"{staging.plan.stage} {task.iteration}"
        self._total = sum(len(task.requests[group].seeds) for name in names for group in task.shards[name])
        self._rollouts = self._tokens = 0  # committed
        self._precision, self._differences = "", list[float]()
        self._error: BaseException | None = None
        self._is_given_up = False
        policy_id = run.id_of(f"policy@{same_weights_since(run, task.policy)}") or ""
        check = read_weight_check(run.weight_check_path(task.policy))
        with ExitStack() as held:
            folder = held.enter_context(self._held_policy(lend, task.policy, policy_id, check))
            policy = None if folder is None else Checkpoint.of(folder)
            self._are_given = policy is None
            self._jobs = {name: ShardJob(task.part(name), policy_id, policy, check) for name in names}
            self._started = time.perf_counter()
            self._thread = threading.Thread(target=self._collect, name="hand-out", daemon=True)
            self._thread.start()
            self._held = held.pop_all()

    def wait(self) -> dict[str, Any]:
        """What the engines were, when all shards are committed. Raises what went wrong meanwhile."""
        shown = 0
        try:
            with self._run.console.progress(self._what, self._total, "rollouts") as advance:
                while self._thread.is_alive():
                    self._thread.join(_SHOWN_S)
                    rate, done = self._tokens / (time.perf_counter() - self._started), self._rollouts
                    advance(done - shown, f"{rate:,.0f} tok/s")
                    shown = done
        finally:
            self.close()
        if self._error is not None:
            raise self._error
        return {
            "precision": self._precision,
            "weight_check_difference": max(self._differences, default=None),
        }

    def close(self) -> None:
        """Give up what is not committed yet; the policy is read no more.

        When a first signal came, shards under way are committed before that.
        """
        console = self._run.console
        try:
            while self._thread.is_alive() and console.is_stopping() and not console.is_urgent:
                self._thread.join(_SHOWN_S)
        finally:
            self._is_given_up = True
            self._thread.join()
            self._held.close()

    def _collect(self) -> None:
        try:
            is_stopping = self._run.console.is_stopping  # then what is under way is still committed
            pool, may_start = self._engines.pool, not self._are_given
            results = pool.run(self._jobs, self._what, self._check_given_up, is_stopping, may_start)
            left = len(self._jobs)
            with closing(results):
                while True:
                    few = is_tail(left, min(pool.count, len(self._jobs)))
                    with self._staging.clock(TAIL if few and left else "sample"):
                        name, result = next(results, ("", None))
                    if result is None:
                        break
                    left -= 1
                    self._commit(name, result)
            if self._rollouts < self._total:
                self._run.console.stop_requested()
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            self._error = error

    def _commit(self, name: str, result: ShardResult) -> None:
        self._note(result.difference, result.said)
        made = result.made
        with self._staging.clock("write"):
            self._staging.adopt(self._table, name, made.content, made.rows, **made.labels)
        self._precision = result.precision
        self._tokens += made.labels["response_tokens"]
        self._rollouts += made.rows

    @contextmanager
    def _held_policy(
        self, lend: Lend, policy: int, policy_id: str, check: WeightCheck
    ) -> Iterator[Path | None]:
        """A folder with policy `policy`, which stays whatever becomes of the run's own.

        None: all engines that are open have been sent it.
        """
        run, prefix = self._run, lent_prefix(self._run)
        for left in lent_folders(run):  # of a process that was killed: we hold the lock
            files.remove(left)
        shared = None if self._engines.pool.is_one_machine else run.path  # a folder that all machines see
        with ExitStack() as stack:
            folder: Path | None = None
            with lend(policy) as source:
                if isinstance(source, Path):
                    folder = source  # the starting policy stays
                    if source.is_relative_to(run.path):
                        folder = Path(stack.enter_context(TemporaryDirectory(dir=run.path, prefix=prefix)))
                        for path in checkpoint_files(source):
                            files.link_file(path, folder / path.name)
                elif self._engines.sender is None:
                    folder = stack.enter_context(source.written(shared, prefix))
                else:
                    self._send(self._engines.sender, source, policy_id, check)
            yield folder

    def _send(self, sender: "Sender", weights: Weights, policy_id: str, check: WeightCheck) -> None:
        with self._staging.clock("load"):
            answers = sender.send(weights, policy_id, check, self._what, self._run.console.stop_requested)
        for difference, said in answers:
            self._note(difference, said)

    def _note(self, difference: float | None, said: list[str]) -> None:
        for text in said:
            self._run.console.say(text)
        self._differences += [] if difference is None else [difference]

    def _check_given_up(self) -> None:
        if self._is_given_up:
            raise Interrupted(0)
