"""vllm_engine: vLLM as an Engine. Opened once, in this process, and reloaded for each policy.

Different from `LLM.generate`: all requests are in flight at once, groups come out as they finish, log-probs
are those after temperature, sampling settings come from the pipeline alone. vLLM's reload is made whole here
(see `_reload`), and nobody takes its word: weight_sync.py compares what it computes.
"""

import dataclasses
import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError

from grpo.errors import EngineError, GrpoError, UsageError
from grpo.generate.engines import vllm_settings
from grpo.generate.engines.protocol import Group, OnProgress, Request, Sampling, check_requests
from grpo.generate.engines.tail import Tail
from grpo.generate.engines.vllm_requests import group_of, params_of
from grpo.models.loading import eos_token_ids
from grpo.models.weights import Weights

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput


class VllmEngine:
    """options: vLLM's engine arguments. max_model_len: tokens of the longest prompt and response together.

    reads_text: responses are read as text while they are sampled, for stop texts or structured outputs.
    transfer: what of vLLM's weight transfer brings weights from another process; None: nothing does.
    """

    device = "cpu"  # it copies them into its own from anywhere

    def __init__(
        self,
        options: dict[str, Any],
        max_model_len: int,
        *,
        reads_text: bool = False,
        transfer: str | None = None,
    ) -> None:
        vllm_settings.check_version()
        vllm_settings.set_environment()
        check_options(options)
        self._options = options
        self._settings = vllm_settings.settings(options, max_model_len)
        self._settings["skip_tokenizer_init"] = not reads_text
        if transfer is not None:
            self._settings["weight_transfer_config"] = {"backend": transfer}
        self._llm: LLM | None = None
        self._workers: list[BaseProcess] = []
        self._stop_ids: list[int] = []
        self._asleep = False
        self._seen: Sequence[int] = []  # the longest prompt of the shard that was sampled last
        self.precision = ""
        self.tail = Tail()

    def load(self, checkpoint: Path) -> None:
        """Open the engine at `checkpoint`, or give the open one its weights. Raises EngineError."""
        self._stop_ids = sorted(eos_token_ids(checkpoint))
        if self._llm is None:
            self._open(checkpoint)
        else:
            self._reload(weights_path=str(checkpoint))

    def take(self, weights: Weights) -> None:
        """Give the engine these weights one by one; its own are copies. One that is not open opens first.

        Workers in processes of their own read them from a folder, which is in memory where there is room.
        """
        if self._llm is None:
            self.load(weights.folder)
        self._stop_ids = sorted(eos_token_ids(weights.folder))
        if self._settings["distributed_executor_backend"] == "uni":
            self._reload(weights_iterator=weights.published())
            return
        with weights.written() as folder:
            self._reload(weights_path=str(folder))

    def _open(self, checkpoint: Path) -> None:
        with self._failures("loading"):
            others = set(active_children())
            cache = vllm_settings.cache(self._options, self._settings, checkpoint)
            self._llm = _open(checkpoint, self._settings | cache)
            gc.collect()
            gc.freeze()  # as in vLLM's own engine process: the collector then skips its million objects
            self._workers = [child for child in active_children() if child not in others]
            config = self._llm.llm_engine.model_config
            self.precision = config.quantization or str(config.dtype).removeprefix("torch.")

    def _reload(self, **source: Any) -> None:
        """Replace all weights, as vLLM's reload_weights takes them; this makes it whole."""
        assert self._llm is not None
        with self._failures("loading"):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])  # level 2 discarded them: what is there now is garbage
            self._llm.collective_rpc("reload_weights", kwargs=source)
            self._make_whole()

    def transfer(self, step: str, **info: Any) -> None:
        """A step of vLLM's weight transfer: what of it the engine's workers have to do, by its name there.

        The last one is `finish_weight_update`; this makes it whole, as a reload.
        """
        assert self._llm is not None, "load() comes before transfer()"
        with self._failures("taking weights"):
            self._llm.collective_rpc(step, kwargs=info)
            if step == "finish_weight_update":
                self._make_whole()

    def _make_whole(self) -> None:
        """After new weights: what vLLM leaves of the old ones."""
        assert self._llm is not None
        self._llm.apply_model(_repack_head)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._drop_prefixes()

    def _drop_prefixes(self) -> None:
        """Cached prefixes belong to the old weights, and vLLM leaves them to its caller.

        It counts the tokens of a prompt that it found there: that tells whether they are gone. A weight check
        cannot, for no prompt of it was there before.
        """
        from vllm import SamplingParams

        assert self._llm is not None
        is_gone = self._llm.reset_prefix_cache()
        if self._seen:
            params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
            [output] = self._finished([("seen", self._seen, params)])
            # Again: whether a prompt is found there moves the last bits of what is sampled for it.
            is_gone = not output.num_cached_tokens and self._llm.reset_prefix_cache()
        if not is_gone:
            raise EngineError("generate: vLLM kept its prefix cache over new weights; nothing was sampled")

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs of every token but the first: vLLM's prompt log-probs, which know no temperature."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        requests = [(str(number), sequence, params) for number, sequence in enumerate(sequences)]
        outputs = {output.request_id: output for output in self._finished(requests)}
        return [np.array(outputs[name].prompt_logprobs.logprobs, dtype=np.float32) for name, _, _ in requests]

    def sample(
        self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
    ) -> Iterator[Group]:
        """Yield each group once, as it finishes. Raises DataError, EngineError."""
        assert self._llm is not None, "load() or take() comes before sample()"
        model = self._llm.llm_engine.model_config
        for shard in shards:  # vLLM would cut a response that does not fit
            check_requests(shard, sampling, model.get_vocab_size(), model.max_model_len)
        last = [request.prompt_token_ids for shard in shards[-1:] for request in shard]
        self._seen = max(last, key=len, default=[])
        requests: list[tuple[str, Sequence[int], Any]] = []
        for request in [request for shard in shards for request in shard]:
            params = params_of(request, sampling, self._stop_ids)
            requests.append((str(request.group_id), request.prompt_token_ids, params))
        for output in self._finished(requests):
            group = group_of(output)
            on_progress(sum(len(sample.token_ids) for sample in group.samples), len(group.samples))
            yield group

    def _finished(self, requests: Sequence[tuple[str, Sequence[int], Any]]) -> "Iterator[RequestOutput]":
        """Put all requests in flight; yield each when it is done. If nobody asks on, the rest is aborted."""
        from vllm.sampling_params import RequestOutputKind

        assert self._llm is not None, "load() or take() comes before use"
        assert not self._asleep, "load() or take() comes before use"
        engine = self._llm.llm_engine
        open_requests = dict[str, int]()  # name -> samples
        try:
            with self._failures("sampling"):
                for name, token_ids, params in requests:
                    params.output_kind = RequestOutputKind.FINAL_ONLY
                    engine.add_request(name, {"prompt_token_ids": list(token_ids)}, params)
                    open_requests[name] = params.n
            slots = min(engine.vllm_config.scheduler_config.max_num_seqs, sum(open_requests.values()))
            while open_requests:
                with self._failures("sampling"), self.tail.at(sum(open_requests.values()), slots):
                    outputs = [output for output in engine.step() if output.finished]
                for output in outputs:
                    del open_requests[output.request_id]
                    yield output
        except GeneratorExit:
            engine.abort_request(list(open_requests))
            raise

    def release(self) -> None:
        """Sleep at level 2 on a GPU: weights and caches are discarded. On a CPU there is nothing to leave."""
        if self._llm is None or self._asleep or not self._settings.get("enable_sleep_mode"):
            return
        with self._failures("sleeping"):
            self._llm.sleep(level=2)
        self._asleep = True

    def close(self) -> None:
        """End vLLM, its workers included."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        with self._failures("closing"):
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.unfreeze()
            gc.collect()
            cleanup_dist_env_and_memory()

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        """Whatever vLLM raises is an engine failure; it raises bare Exception too."""
        try:
            yield
        except GrpoError:
            raise
        except Exception as error:
            text = str(error) or type(error).__name__
            if isinstance(error, ValidationError):  # of vLLM's configuration
                first = error.errors()[0]
                text = first["msg"]
                for name in self._options.keys() & first["loc"][:1]:
                    message = f"generate.engine_options.{name}: {self._options[name]!r}: {text}"
                    raise UsageError(message) from error
            dead = [f"{p.name} died (exit code {p.exitcode})" for p in self._workers if not p.is_alive()]
            found = ", ".join(dead) or shorten(text, width=300, placeholder=" ...")
            raise EngineError(
                f"generate: vLLM failed while {doing}: {found}; what is committed is kept"
                " (VLLM_LOGGING_LEVEL=INFO shows its own log)"
            ) from error


def check_options(options: dict[str, Any]) -> None:
    """Raise UsageError (exit 2) for an option that vLLM does not have, or that is not the user's to set.

    Also when vLLM is there but cannot be imported.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:  # a library of another build, often: vLLM's own dependencies are many
        message = f"vllm is installed but cannot be imported: {error}"
        raise UsageError(f"generate.engine: {message}; {vllm_settings.INSTALL}") from error
    known: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    vllm_settings.check_options(options, known)


def _open(checkpoint: Path, settings: dict[str, Any]) -> "LLM":
    from vllm import LLM

    # On a CPU vLLM replaces torch.set_num_threads and may leave one thread to the learner.
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with warnings.catch_warnings(action="ignore"):
            return LLM(model=str(checkpoint), **settings)
    finally:
        torch.set_num_threads = set_num_threads
        set_num_threads(num_threads)


def _repack_head(model: torch.nn.Module) -> None:
    """Pack the output head anew from its weights, in every worker.

    On a CPU the head holds a packed copy, which a reload leaves as it was where the head is tied to the
    embeddings: log-probs were off by 0.19 nats, in silence.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
