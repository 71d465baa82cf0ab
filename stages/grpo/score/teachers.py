"""teachers: rollouts -> the log-prob of every sampled token under a teacher: the table `teacher_logprobs`.

A shard is one teacher over one rollout shard, committed at once and kept by a hard link while both are what
they were. A teacher reads the policy's own tokens, so its tokenizer has to be the policy's.
Shapes: S rollouts read at once, L tokens of the longest, N response tokens of theirs that count, T tokens of
one response.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from grpo import tables
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Staging, digest
from grpo.errors import DataError, EngineError
from grpo.models.batches import batches
from grpo.models.find import model_path
from grpo.models.loading import best_device, context_length, load_model, load_tokenizer
from grpo.models.reader import Reader, move
from grpo.score.plan import STAGE_VERSION
from grpo.score.shard import File, read

TABLE = "teacher_logprobs"
_READ = [
    *tables.KEY,
    "prompt_token_ids",
    "response_token_ids",
    "old_logprobs",
    "response_mask",
    "temperature",
]
Row = dict[str, Any]


def open_teachers(run: ActiveRun) -> "dict[str, Teacher]":
    """The configured teachers by name. Raises InputError, CorruptError as load_model()."""
    own = load_tokenizer(run.start["policy"])
    return {
        each.name: Teacher(each.name, model_path(run, each.model), own, best_device())
        for each in run.config.score.teachers
    }


class Teacher:
    """A causal language model in float32, kept between iterations; its tokens are compared as they come.

    policy_tokenizer: of the policy, whose ids it reads.
    """

    def __init__(self, name: str, checkpoint: Path, policy_tokenizer: Any, device: str) -> None:
        self.name = name
        self._model = load_model(checkpoint, "cpu").requires_grad_(False)
        self._tokenizers: tuple[Any, Any] = (policy_tokenizer, load_tokenizer(checkpoint))
        self._reader, self._device = Reader(self._model), device
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        self._agreed: set[int] = set()

    def release(self) -> None:
        """Leave the accelerator until the next commit()."""
        if self._device != "cpu":
            move(self._model, "cpu")
            torch.cuda.empty_cache()

    def commit(
        self, run: ActiveRun, staging: Staging, rollouts: dict[str, File], earlier: Manifest | None
    ) -> list[FileRecord]:
        """Commit a shard of `teacher_logprobs` per file of rollouts, by name; those of `earlier` are kept.

        Raises DataError (exit 3) for a token that is another for the policy, and for a rollout beyond the
        teacher's context; EngineError (exit 8) for log-probs that are not finite.
        """
        move(self._model, self._device)
        records = []
        for name, file in rollouts.items():
            if (record := staging.committed(name)) is None:
                with staging.clock(self.name):
                    record = self._shard(run, staging, file, earlier, name)
                run.console.stop_requested()
            records.append(record)
        return records

    def _shard(
        self, run: ActiveRun, staging: Staging, file: File, earlier: Manifest | None, name: str
    ) -> FileRecord:
        source = staging.plan.user_files[f"score.teachers.{self.name}"]
        unit = digest([STAGE_VERSION, TABLE, self.name, source, file.record.sha256])
        for held in earlier.files if earlier else ():
            if held.table == TABLE and held.unit == unit:
                return staging.link_table(
                    held, run.path_of(held, staging.plan.output, staging.plan.iteration), name
                )
        rows = read(run, "rollouts", [file], _READ).to_pylist()
        for row in rows:
            self._check(row)
        title = f"score {staging.plan.iteration} {self.name}"
        with run.console.progress(title, len(rows), "rollouts") as advance:
            found = [np.zeros(len(row["response_mask"]), dtype=np.float32) for row in rows]
            lengths = {
                place: len(row["prompt_token_ids"]) + len(row["response_token_ids"])
                for place, row in enumerate(rows)
                if any(row["response_mask"])  # of the others there is nothing to be read
            }
            for batch in batches(lengths, run.config.score.max_tokens_per_batch):
                for place, logprobs_T in zip(batch, self._logprobs([rows[n] for n in batch]), strict=True):
                    found[place] = logprobs_T
                advance(len(batch))
        data = pa.Table.from_pylist(
            [self._row(row, logprobs_T) for row, logprobs_T in zip(rows, found, strict=True)],
            schema=tables.schema(TABLE),
        )
        return staging.write_shard(TABLE, name, data, unit, teacher=self.name)

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """logprobs_T of each of S rows: of every response token, float32 [T], 0 where it does not count."""
        ids = [torch.tensor(row["prompt_token_ids"] + row["response_token_ids"]) for row in rows]
        # Padding stands on the right, where no token that counts sees it.
        input_ids_SL = pad_sequence(ids, batch_first=True).to(self._device)
        counted = [np.flatnonzero(row["response_mask"]) for row in rows]
        width, places, targets = input_ids_SL.shape[1], [], []
        for s, (row, at) in enumerate(zip(rows, counted, strict=True)):
            places.append(s * width + len(row["prompt_token_ids"]) + at - 1)
            targets.append(np.array(row["response_token_ids"], dtype=np.int64)[at])
        lengths = [len(at) for at in counted]
        temperatures = np.repeat([row["temperature"] for row in rows], lengths).astype(np.float32)
        arrays = (np.concatenate(places), np.concatenate(targets), temperatures)
        places_N, targets_N, temperature_N = (torch.from_numpy(array).to(self._device) for array in arrays)
        inputs = {"input_ids": input_ids_SL, "use_cache": False}
        logprobs_N, _ = self._reader(inputs, places_N, targets_N, temperature_N)
        parts = np.split(logprobs_N.float().cpu().numpy(), np.cumsum(lengths)[:-1])
        found = [np.zeros(len(row["response_mask"]), dtype=np.float32) for row in rows]
        for values_T, at, part in zip(found, counted, parts, strict=True):
            values_T[at] = part
        return found

    def _row(self, row: Row, logprobs_T: np.ndarray) -> Row:
        if not np.isfinite(logprobs_T).all():
            raise EngineError(
                f"score: teacher {self.name}: a log-prob of rollout {tables.key_text(row)} is not finite"
            )
        counts = np.array(row["response_mask"], dtype=bool)
        gaps = logprobs_T.astype(np.float64)[counts] - np.array(row["old_logprobs"])[counts]
        gap = float(gaps.mean()) if len(gaps) else None
        return {**row, "name": self.name, "logprobs": logprobs_T, "gap": gap}

    def _check(self, row: Row) -> None:
        ids = row["prompt_token_ids"] + row["response_token_ids"]
        where = f"score: teacher {self.name}: rollout {tables.key_text(row)}"
        limit = context_length(self._model.config)
        if limit is not None and len(ids) > limit:
            raise DataError(f"{where} is {len(ids)} tokens, and its context {limit}; take another teacher")
        for number in ids:
            if number not in self._agreed:
                policy, teacher = (each.convert_ids_to_tokens(number) for each in self._tokenizers)
                if policy != teacher or number >= self._vocabulary:
                    raise DataError(
                        f"{where} has token {number}, {policy!r} for the policy and {teacher!r} for the"
                        " teacher; a teacher needs the policy's tokenizer"
                    )
                self._agreed.add(number)
