"""durable: when a policy is written to disk, and the writing, beside whatever comes next.

While rollouts are sampled and scored the learner's tensors rest, so that nothing is copied on a CPU. Before
they change, flush() waits.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from grpo.artifacts import (
    ADAPTER,
    CHECKPOINT,
    POLICY,
    ActiveRun,
    FileRecord,
    Plan,
    Product,
    Staging,
    Writer,
    drop,
    durable_policies,
    id_of,
    is_durable,
    prune_known,
    require_space,
)
from grpo.errors import GrpoError
from grpo.update.checkpoint import FILE_BYTES
from grpo.update.learner import Learner
from grpo.update.optimizer import tensors_of
from grpo.update.own_files import OwnFile, own_files
from grpo.update.rank_files import Together

STAGE_VERSION = 1
SHARE, LONGEST_S = 0.02, 1800.0  # of `auto`: the most of the time that writing takes, and a policy waits
_BYTES_PER_S = 2e8  # of a disk nobody has measured yet


class Checkpoints:
    """Of one run, while a learner works on it. Nothing is written where the policy is on disk already.

    file_bytes: of tensors in a file.
    """

    def __init__(self, run: ActiveRun, file_bytes: int = FILE_BYTES) -> None:
        self._run, self._writer, self._file_bytes = run, Writer(), file_bytes
        self._finish: Callable[[], None] | None = None  # of what several processes write
        self._have: list[int] | None = None  # durable, from 1 on, in order
        self._seconds: float | None = None  # that the last one took
        self._since = time.monotonic()

    def consider(self, policy: int, learner: Learner) -> None:
        """Begin to write the policy that the learner holds, where it is due."""
        if self._is_due(policy, learner):
            self.write(policy, learner)

    def write(self, policy: int, learner: Learner) -> None:
        """Begin to write the policy that the learner holds; flush() says when it is done."""
        if policy == 0 or is_durable(self._run, policy):
            return
        self.flush()
        require_space(self._run, CHECKPOINT, policy - 1, _bytes_of(learner))
        start, weights = self._run.start["policy"], learner.digest()
        if learner.ranks is None:
            files = own_files(learner, start, self._file_bytes)
            self._writer.start(partial(self._write, policy, files, weights))
        else:
            part = POLICY if learner.adapter is None else ADAPTER
            together = Together(learner, self._staging(policy), start, part, self._file_bytes)
            self._finish = partial(self._take, policy, together, weights)

    def prune(self) -> None:
        """Drop those that are kept no longer, as when another one is the best."""
        self.flush()
        self._have = prune_known(self._run, self._known())

    def flush(self) -> None:
        """Wait until nothing is being written. Raises ResourceError (exit 7) where it failed."""
        self._writer.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def close(self) -> None:
        """The same at the end of the work, when something else may have failed already."""
        with suppress(GrpoError):
            self.flush()
        self._writer.close()

    def _is_due(self, policy: int, learner: Learner) -> bool:
        config, update = self._run.config.checkpoints, self._run.config.update
        moves = update.reference_every if update.kl_coefficient else None
        if any(number and policy % number == 0 for number in (config.keep_every, moves)):
            return True
        if isinstance(config.every, int):
            return policy % config.every == 0
        waited = time.monotonic() - self._since
        if config.every != "auto":
            return waited >= 60 * int(config.every.removesuffix("m"))
        seconds = self._seconds
        if seconds is None:
            seconds = _bytes_of(learner) / _BYTES_PER_S
        return waited >= min(seconds / SHARE, LONGEST_S)

    def _write(self, policy: int, files: list[OwnFile], weights: str) -> None:
        """In the writer's thread, where this process writes all of it."""
        started, staging = time.monotonic(), self._staging(policy)
        records = [staging.write_bytes(part, name, content) for part, name, content in files]
        self._commit(policy, staging, records, weights, time.monotonic() - started)

    def _take(self, policy: int, together: Together, weights: str) -> None:
        """Once others have written their part of it."""
        records, seconds = together.finish()
        self._commit(policy, together.staging, records, weights, seconds)

    def _staging(self, policy: int) -> Staging:
        """An empty one, with no other checkpoint of that update in its way."""
        run, number = self._run, policy - 1
        for left in run.staging_root(number).glob(f"{CHECKPOINT}-*"):
            drop(run, left)
        drop(run, run.folder(CHECKPOINT, number))  # of another policy, which its update made before
        return Staging(run, plan(run, policy), 0)

    def _commit(
        self, policy: int, staging: Staging, files: list[FileRecord], weights: str, seconds: float
    ) -> None:
        """Commit it, then drop those that are kept no longer."""
        files.sort(key=lambda file: (file.part, file.name))  # whoever wrote them
        staging.seconds["write"] = seconds
        staging.commit(Product({CHECKPOINT: id_of(files)}, files, {"weights": weights}))
        self._have = prune_known(self._run, sorted({*self._known(), policy}))
        self._since, self._seconds = time.monotonic(), seconds

    def _known(self) -> list[int]:
        return durable_policies(self._run)[1:] if self._have is None else self._have


def plan(run: ActiveRun, policy: int) -> Plan:
    """The checkpoint of a policy. It depends on that policy alone, and under an adapter on its base."""
    lora = run.config.update.lora
    references = [f"policy@{policy}", *(["policy@0"] if lora else [])]
    return Plan(
        stage=CHECKPOINT,
        stage_version=STAGE_VERSION,
        output=CHECKPOINT,
        iteration=policy - 1,
        config={},
        inputs={reference: run.id_of(reference) or "" for reference in references},
    )


def _bytes_of(learner: Learner) -> int:
    """About what a checkpoint takes: what trains, and its optimiser state."""
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    states = (learner.optimizer.state.get(p, {}) for p in trained)
    moments = sum(tensor.nbytes for state in states for tensor in tensors_of(state).values())
    return sum(p.nbytes for p in trained) + moments
