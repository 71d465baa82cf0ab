"""Stop texts and the repetition penalty of the built-in engine; vLLM's are in test_vllm_text.py."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import Qwen2ForCausalLM

from grpo.errors import EngineError, InputError
from grpo.generate.engines.draw import penalise
from grpo.generate.engines.protocol import Group, Request, Sampling, group_seed
from grpo.generate.engines.stop import StopWatch
from grpo.generate.engines.transformers_engine import TransformersEngine
from grpo.models import starter_model

NEW = 40


def word_tokenizer(words: Sequence[str], decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoder
    return tokenizer


def ends_at(tokenizer: Tokenizer, prompt: list[int], response: list[int], stop: Sequence[str]) -> int | None:
    """The number of tokens after which the response has ended."""
    watch = StopWatch(tokenizer, prompt, stop)
    return next((n for n, token in enumerate(response, 1) if watch.sees(token)), None)


WORDS = ["<unk>", "</ans", "wer>", "x", "\n", "\n\n", "ab", "a", "b", "<end>"]


@pytest.mark.parametrize(
    ("stop", "response", "expected"),
    [
        (["</answer>"], ["x", "</ans", "wer>", "x"], 3),  # across two tokens
        (["</answer>"], ["</ans", "x", "wer>", "x"], None),
        (["s"], ["x", "</ans", "wer>"], 2),  # within a token
        (["\n\n"], ["\n", "x", "\n", "\n"], 4),
        (["\n\n"], ["x", "\n\n", "x"], 2),
        (["ba"], ["ab", "ab"], 2),
        (["aaab"], ["a", "a", "a", "a", "b"], 5),  # begins anew within what was seen
        (["zz", "b"], ["x", "ab", "b"], 2),  # the first of several
        (["x"], ["x"], 1),
        (["bx", "abxa"], ["a", "b", "x"], 3),
        (["<end>"], ["a", "<end>"], 2),
    ],
)
def test_where_a_text_ends_a_response(stop: list[str], response: list[str], expected: int | None) -> None:
    tokenizer = word_tokenizer(WORDS, decoders.Fuse())
    ids = [WORDS.index(word) for word in response]
    assert ends_at(tokenizer, [WORDS.index("x")], ids, stop) == expected


def test_what_the_prompt_ends_with_is_no_part_of_a_text() -> None:
    tokenizer = word_tokenizer(WORDS, decoders.Fuse())
    assert ends_at(tokenizer, [WORDS.index("a")], [WORDS.index("b")] * 2, ["ab"]) is None


def test_a_word_has_its_space_behind_a_prompt() -> None:
    # A decoder of this kind takes the space from the first word of a text, which a response's is not.
    words = ["<unk>", "▁so", "▁on"]
    tokenizer = word_tokenizer(words, decoders.Metaspace())
    assert ends_at(tokenizer, [1], [2], [" on"]) == 1


def test_special_tokens_are_text_too() -> None:
    tokenizer = starter_model.build_tokenizer()
    end: Any = tokenizer.eos_token_id
    content = str(tokenizer.decode([end]))
    assert ends_at(tokenizer.backend_tokenizer, [65], [65, end], [content]) == 2


def test_a_character_of_several_tokens_counts_when_it_is_whole() -> None:
    backend = starter_model.build_tokenizer().backend_tokenizer
    ids = backend.encode("café!", add_special_tokens=False).ids
    assert len(ids) == 6  # a token is a byte
    assert ends_at(backend, ids[:1], ids, ["fé"]) == 5
    assert ends_at(backend, ids[:1], ids, ["é!"]) == 6


# The engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop") / "model"
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(tiny.qwen2(eos_token_id=None))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    starter_model.build_tokenizer().save_pretrained(folder)
    return folder


PROMPTS = [list(b"1+2="), list(b"x"), list(b"a longer prompt: ")]
REQUESTS = [
    Request(n, prompt, [group_seed(0, 0, n) + s for s in range(6)]) for n, prompt in enumerate(PROMPTS)
]


def sampled(checkpoint: Path, **settings: Any) -> dict[int, Group]:
    engine = TransformersEngine("cpu", 64)
    engine.load(checkpoint)
    groups = engine.sample([REQUESTS], Sampling(0.8, NEW, **settings), lambda *_: None)
    return {group.group_id: group for group in groups}


def test_a_stop_text_cuts_what_would_have_been_sampled(checkpoint: Path) -> None:
    tokenizer = starter_model.build_tokenizer()
    free = sampled(checkpoint)
    stop = _texts_within(free)
    stopped, lengths = sampled(checkpoint, stop=tuple(stop)), []
    for request in REQUESTS:
        pairs = zip(free[request.group_id].samples, stopped[request.group_id].samples, strict=True)
        for whole, cut in pairs:
            ids = whole.token_ids.tolist()
            # Restated: the shortest beginning whose text holds one of the texts.
            expected = next(
                (
                    n
                    for n in range(1, len(ids) + 1)
                    if any(text in tokenizer.decode(ids[:n]) for text in stop)
                ),
                None,
            )
            assert cut.token_ids.tolist() == ids[:expected]
            assert np.abs(cut.logprobs - whole.logprobs[:expected]).max() <= 1e-5  # as sampled
            assert cut.finish_reason == ("length" if expected is None else "stop")
            lengths.append(len(cut.token_ids))
    assert 1 < min(lengths) < NEW == max(lengths)


def _texts_within(groups: dict[int, Group]) -> list[str]:
    """Two letters of ASCII, that stand behind each other in the middle of some of the responses."""
    found = []
    for group in groups.values():
        ids = group.samples[0].token_ids[4:30].tolist()
        pairs = pairwise(ids)
        found += [bytes(pair).decode() for pair in pairs if all(32 < number < 127 for number in pair)][:1]
    assert len(found) >= 2
    return found


def test_stop_texts_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    stop = tuple(_texts_within(sampled(checkpoint)))
    together = sampled(checkpoint, stop=stop)
    engine = TransformersEngine("cpu", 1)  # a group is a batch
    engine.load(checkpoint)
    for group in engine.sample([REQUESTS], Sampling(0.8, NEW, stop=stop), lambda *_: None):
        for one, other in zip(group.samples, together[group.group_id].samples, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.finish_reason == other.finish_reason


def test_stop_texts_need_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"bare: has no tokenizer\.json, which is needed to read token by"):
        sampled(bare, stop=("x",))


def test_the_penalty_by_hand() -> None:
    logits_NV = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    seen_NV = torch.tensor([[True, True, False, False]])
    assert penalise(logits_NV, seen_NV, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_log_probs_are_those_of_the_penalised_distribution(checkpoint: Path, penalty: float) -> None:
    auto: Any = Qwen2ForCausalLM
    model = auto.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for group in sampled(checkpoint, repetition_penalty=penalty).values():
        prompt = PROMPTS[group.group_id]
        for sample in group.samples[:2]:
            ids = sample.token_ids.tolist()
            with torch.no_grad():
                logits_TV = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            for place, token in enumerate(ids):
                logits_V = logits_TV[place].clone()
                for number in set(prompt + ids[:place]):
                    logits_V[number] *= 1 / penalty if logits_V[number] > 0 else penalty
                expected = torch.log_softmax(logits_V / 0.8, -1)[token]
                assert abs(float(expected) - sample.logprobs[place]) <= 1e-5


def test_structured_outputs_are_refused(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="structured_outputs need engine: vllm"):
        sampled(checkpoint, structured_outputs={"regex": "a+"})
