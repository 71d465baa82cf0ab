"""stop: texts that end a response, found as its tokens come. As vLLM does it: the token that completes one is
the last, and text is what a token adds behind the tokens before it, the prompt's included.

Shapes: B samples of a batch, N samples still in the batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from grpo.generate.engines.protocol import Request
from grpo.models.tokenizer import TextStream

_CONTEXT = 8  # tokens of the prompt: decoders write the first of a text in a way of their own


class StopWatch:
    """Of one response: whether one of the texts `stop` has appeared in it, special tokens included."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, list(prompt[-_CONTEXT:]))
        self._stop = stop
        self._kept = max(map(len, stop)) - 1  # characters that a text yet to be completed may begin with
        self._tail = ""

    def sees(self, token: int) -> bool:
        """Take the next token; True where it completes one of the texts."""
        text = self._tail + self._stream.add(token)
        self._tail = text[max(len(text) - self._kept, 0) :]
        return any(each in text for each in self._stop)


class StopWatches:
    """Of the samples of a batch. stopped_B: those that a text has ended, bool.

    tokenizer: None where no text ends a response.
    """

    def __init__(self, tokenizer: Tokenizer | None, requests: Sequence[Request], stop: Sequence[str]) -> None:
        prompts = [request.prompt_token_ids for request in requests for _ in request.seeds]
        self._watches = [] if tokenizer is None else [StopWatch(tokenizer, each, stop) for each in prompts]
        self.stopped_B = np.zeros(len(prompts), dtype=bool)

    def ended(self, ended_N: Tensor, sample_N: Tensor, tokens_N: Tensor) -> Tensor:
        """Take the next token of each sample of sample_N: ended_N, and where it completes a text."""
        if not self._watches:
            return ended_N
        samples = sample_N.tolist()
        for sample, token in zip(samples, tokens_N.tolist(), strict=True):
            self.stopped_B[sample] = self._watches[sample].sees(token)
        return ended_N | torch.from_numpy(self.stopped_B[samples]).to(ended_N.device)
