"""Real vLLM with its tokenizer: stop texts as the built-in engine has them, penalties, structured outputs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.generate.engines.test_stop import ends_at
from tests.generate.engines.test_vllm_engine import STOP_IDS, requests, write_checkpoint

from grpo.generate.engines.protocol import Group, Request, Sampling
from grpo.models import starter_model

pytest.importorskip("vllm")
from grpo.generate.engines import vllm_engine

pytestmark = pytest.mark.xdist_group("vllm")

NEW = 24
WANTED = requests([[51, 43, 52, 61], [97], list(range(60, 80))], k=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vllm_text") / "policy", seed=0)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[vllm_engine.VllmEngine]:
    engine = vllm_engine.VllmEngine({}, 300, reads_text=True)
    engine.load(checkpoint)
    yield engine
    engine.close()


def sampled(engine: vllm_engine.VllmEngine, wanted: list[Request] = WANTED, **settings: Any) -> list[Group]:
    groups = engine.sample([wanted], Sampling(1.0, NEW, **settings), lambda *_: None)
    return sorted(groups, key=lambda group: group.group_id)


def test_stop_texts_end_responses_where_the_built_in_engine_would(engine: vllm_engine.VllmEngine) -> None:
    backend = starter_model.build_tokenizer().backend_tokenizer
    free = sampled(engine)
    for stop in (("A", "e", "t"), ("\ufffd",), ("<nothing like it>",)):
        cut, ended = sampled(engine, stop=stop), 0
        for request, whole, short in zip(WANTED, free, cut, strict=True):
            for one, other in zip(whole.samples, short.samples, strict=True):
                ids = one.token_ids.tolist()
                expected = ends_at(backend, list(request.prompt_token_ids), ids, stop)
                assert other.token_ids.tolist() == ids[:expected]
                assert len(other.logprobs) == len(other.token_ids)
                assert np.abs(other.logprobs - one.logprobs[:expected]).max() <= 1e-5
                assert other.finish_reason == (one.finish_reason if expected is None else "stop")
                ended += expected is not None
        assert bool(ended) == (stop[0] != "<nothing like it>")


def test_log_probs_are_those_of_the_penalised_distribution(
    engine: vllm_engine.VllmEngine, checkpoint: Path
) -> None:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for request, group in zip(WANTED, sampled(engine, repetition_penalty=1.5), strict=True):
        prompt, ids = list(request.prompt_token_ids), group.samples[0].token_ids.tolist()
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        for place, token in enumerate(ids):
            logits_V = logits_TV[place].clone()
            for number in set(prompt + ids[:place]):
                logits_V[number] *= 1 / 1.5 if logits_V[number] > 0 else 1.5
            expected = float(torch.log_softmax(logits_V, -1)[token])
            assert abs(expected - group.samples[0].logprobs[place]) <= 1e-4


@pytest.mark.parametrize(
    ("structure", "allowed"),
    [({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "(a|b)c"}, {"ac", "bc"})],
)
def test_structured_outputs(
    engine: vllm_engine.VllmEngine, structure: dict[str, Any], allowed: set[str]
) -> None:
    tokenizer = starter_model.build_tokenizer()
    for group in sampled(engine, structured_outputs=structure):
        for sample in group.samples:
            *ids, last = sample.token_ids.tolist()
            assert tokenizer.decode(ids) in allowed
            assert (last in STOP_IDS, sample.finish_reason) == (True, "stop")
            assert np.isfinite(sample.logprobs).all()
            assert (sample.logprobs <= 0).all()
