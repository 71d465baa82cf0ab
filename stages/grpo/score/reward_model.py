"""reward_model: prompts + responses -> one number per rollout, from a classifier checkpoint with one label.

Texts go through its own tokenizer and chat template, never the policy's. B rows, T tokens.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from grpo.artifacts import checkpoint_files
from grpo.config.score import MODEL_TIMEOUT_S
from grpo.errors import DataError, EngineError, InputError
from grpo.models.attention import choose_attention, vocabulary
from grpo.models.batches import batches
from grpo.models.loading import context_length, load_pretrained, load_tokenizer, read_config
from grpo.models.refusals import refusals
from grpo.prompts.renderer import TIMEOUT_S, Renderer, template_of
from grpo.prompts.template_worker import Failure, Request
from grpo.score.functions.built_in import Text, Texts
from grpo.score.outcome import Outcome, one_line, outcome_of

NO_LIMIT = 10**30  # as tokenizers say it


class RewardModel:
    """A classifier in float32 on `device`, kept between iterations.

    directory: a local checkpoint, safetensors. stop: called while its chat template is waited for, and may
    raise. To be closed. Raises InputError where it is not there, cannot be loaded without code of its own,
    lacks weights, or does not have exactly one label; CorruptError where its weights cannot be read.
    """

    def __init__(self, directory: Path, device: str, stop: Callable[[], None] = lambda: None) -> None:
        require_weights(directory)
        self._where = f"reward model {directory}"
        self._model = _load_classifier(directory, device)
        self._tokenizer: Any = load_tokenizer(directory)  # Any: its calls return unions of everything
        self._template: str | None = None
        if self._tokenizer.chat_template is not None:
            self._template = template_of(self._tokenizer)
        self._renderer = Renderer(stop)
        self._device = device
        self._text_config = self._model.config.get_text_config()
        self._pad_token_id: int | None = self._text_config.pad_token_id
        self._max_tokens = _max_tokens(self._model, self._tokenizer)

    def release(self) -> None:
        """Leave the accelerator until the next score()."""
        self._model.to("cpu")
        torch.cuda.empty_cache()

    def close(self) -> None:
        """End the process of the chat template."""
        self._renderer.close()

    def score(
        self,
        prompts: Texts,
        completions: Texts,
        max_tokens_per_batch: int,
        timeout_s: float = MODEL_TIMEOUT_S,
    ) -> list[Outcome]:
        """Outcomes in the order of the rollouts.

        max_tokens_per_batch: rows x longest row, padding included; memory only, it never changes a value
        beyond rounding. timeout_s: of one batch, and of the template on one rollout, which has 10 s at most;
        what takes longer ends the command: EngineError (exit 8), DataError (exit 3).
        """
        self._model.to(self._device)
        texts = self._texts(prompts, completions, min(timeout_s, TIMEOUT_S))
        read = {place: self._token_ids(text) for place, text in enumerate(texts)}
        outcomes = {place: Outcome(None, "error", row) for place, row in read.items() if isinstance(row, str)}
        rows = {place: row for place, row in read.items() if not isinstance(row, str)}
        for batch in batches({place: len(row) for place, row in rows.items()}, max_tokens_per_batch):
            late = f"a batch of {len(batch)} rollouts took longer than timeout_s, {timeout_s:g} s"
            way_out = "allow it more, or fewer score.max_tokens_per_batch"
            with _deadline(timeout_s, f"{self._where}: {late}; {way_out}", self.close):
                values = self._values([rows[place] for place in batch])
            for place, value in zip(batch, values, strict=True):
                outcomes[place] = outcome_of(value, "the reward model gave")
        return [outcomes[place] for place in read]

    def _texts(self, prompts: Texts, completions: Texts, timeout_s: float) -> Iterator[str | Failure]:
        """Each whole conversation through the chat template; without one, the texts behind each other."""
        chats = [
            [*_messages(prompt, "user"), *_messages(completion, "assistant")]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        if self._template is None:
            for prompt, chat in zip(prompts, chats, strict=True):
                separator = "" if isinstance(prompt, str) else "\n"
                yield separator.join(message["content"] or "" for message in chat)
            return
        special = self._tokenizer.special_tokens_map
        for found in self._renderer.render(
            self._template, (Request(chat, special) for chat in chats), timeout_s
        ):
            if isinstance(found, Failure) and found.at_limit:
                raise DataError(f"{self._where}: its chat template cannot render a rollout: {found.reason}")
            yield found

    def _token_ids(self, text: str | Failure) -> list[int] | str:
        """Of a conversation, which is never cut; or what is wrong with it."""
        if isinstance(text, Failure):
            return one_line(f"the reward model's chat template refuses the messages: {text.reason}")
        # A template has written its special tokens itself.
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=self._template is None)["input_ids"]
        if not token_ids:
            return "prompt and response together are no tokens"
        if max(token_ids) >= vocabulary(self._model):
            return f"its tokenizer gives token {max(token_ids)}, which the reward model does not know"
        if len(token_ids) > self._max_tokens:
            context = f"the reward model's context is {self._max_tokens}"
            return f"prompt and response are {len(token_ids)} tokens, {context}"
        return token_ids

    @torch.inference_mode()
    def _values(self, rows: Sequence[Sequence[int]]) -> list[float]:
        pad_token_id = self._pad_for(rows)
        ids = [torch.tensor(row) for row in rows]
        token_ids_BT = pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(self._device)
        mask_BT = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(self._device)
        self._text_config.pad_token_id = pad_token_id
        logits_B1 = self._model(input_ids=token_ids_BT, attention_mask=mask_BT).logits
        self._text_config.pad_token_id = self._pad_token_id
        values: list[float] = logits_B1.float()[:, 0].tolist()
        return values

    def _pad_for(self, rows: Sequence[Sequence[int]]) -> int:
        """The model's own pad token, unless there is none or a row ends with it: then any that ends no row.

        A decoder classifier reads the last token that differs from `config.pad_token_id`. Where pad is the
        end-of-sequence token it would read the one before, and where there is none it refuses batches.
        """
        last_tokens = {row[-1] for row in rows}
        candidates: list[int | None] = [self._pad_token_id, *range(len(rows) + 1)]
        return next(each for each in candidates if each is not None and each not in last_tokens)


def require_weights(directory: Path) -> None:
    """Raise InputError (exit 4) unless a checkpoint is there, as a plan does, and say whose."""
    try:
        checkpoint_files(directory)
    except InputError as error:
        raise InputError(f"reward model {error}") from None


@contextmanager
def _deadline(seconds: float, message: str, close: Callable[[], None]) -> Iterator[None]:
    """Raise EngineError (exit 8) in a thread beside this one when the block takes longer than `seconds`.

    Nothing interrupts what hangs in C or on a GPU: cli/entry.py ends the process when a thread raises. What
    close() ends, and what it held, would outlive that.
    """

    def end() -> None:
        close()
        gc.collect()
        raise EngineError(message)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _load_classifier(directory: Path, device: str) -> Any:
    where = f"reward model {directory}"
    with refusals(where, "cannot be loaded as a classifier"):
        config = read_config(directory)
        if config.num_labels != 1:
            raise InputError(f"{where}: has {config.num_labels} labels; a reward needs exactly 1")
        model, report = load_pretrained(AutoModelForSequenceClassification, directory, "auto", config=config)
    # transformers fills missing weights with random numbers and only warns: any language model would load.
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{where}: is not a trained classifier; its weights lack {', '.join(missing[:3])}")
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.to(device, copy=True)  # not mapped to the file, as in models/loading.py
    model.to(device).eval().requires_grad_(False)
    with refusals(where, "its model computes nothing"):
        choose_attention(model, "auto")
    return model


def _max_tokens(model: Any, tokenizer: Any) -> int:
    """The longest row that the model takes."""
    limit = context_length(model.config) or NO_LIMIT
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind the padding index, and so has that many fewer.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    return min(limit, int(tokenizer.model_max_length))


def _messages(text: Text, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(each) for each in text]
