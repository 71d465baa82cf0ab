import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import WIDTHS
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from grpo.artifacts import files
from grpo.config import LoraConfig
from grpo.errors import DataError, EngineError
from grpo.generate.engines.protocol import Group, Request, Sampling, group_seed
from grpo.generate.engines.transformers_engine import TransformersEngine, plan_batches
from grpo.models.loading import load_model
from grpo.models.weights import Weights
from grpo.update.adapter import add_adapter
from grpo.update.checkpoint import policy_files

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **WIDTHS,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
    "pad_token_id": 3,  # the pad token is the end-of-sequence token, as in many checkpoints
}
# A window of 6 is shorter than the prompts and the responses of REQUESTS.
FAMILIES: dict[str, Any] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=3, bos_token_id=3
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
}
NUM_SAMPLES = 4


def write_checkpoint(path: Path, config: Any, seed: int = 0, eos: Any = 3) -> Path:
    torch.manual_seed(seed)
    auto_class: Any = AutoModelForCausalLM
    model = auto_class.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # far from uniform
    model.generation_config.eos_token_id = eos
    model.save_pretrained(path)
    return path


def request(group_id: int, length: int, num_samples: int = NUM_SAMPLES) -> Request:
    prompt = np.random.default_rng(group_id).integers(4, VOCABULARY, length).tolist()
    first = group_seed(0, 0, group_id)
    return Request(group_id, prompt, [first + sample for sample in range(num_samples)])


REQUESTS = [request(group_id, length) for group_id, length in enumerate([9, 1, 17, 3, 9, 2])]
WARM = Sampling(temperature=1.0, max_new_tokens=12)


def opened(checkpoint: Path, max_rows_per_batch: int = 64) -> TransformersEngine:
    engine = TransformersEngine("cpu", max_rows_per_batch)
    engine.load(checkpoint)
    return engine


def sampled(
    engine: TransformersEngine, shards: Sequence[Sequence[Request]], sampling: Sampling = WARM
) -> dict[int, Group]:
    groups = list(engine.sample(shards, sampling, lambda *_: None))
    by_id = {group.group_id: group for group in groups}
    assert len(by_id) == len(groups) == sum(len(shard) for shard in shards)
    return by_id


def digest(groups: dict[int, Group]) -> str:
    digest = sha256()
    for group_id in sorted(groups):
        for sample in groups[group_id].samples:
            digest.update(sample.token_ids.tobytes() + sample.logprobs.tobytes())
            digest.update(sample.finish_reason.encode())
    return digest.hexdigest()


def tokens(groups: dict[int, Group]) -> dict[int, list[list[int]]]:
    return {key: [sample.token_ids.tolist() for sample in group.samples] for key, group in groups.items()}


@torch.no_grad()
def plain_logprobs(model: Any, prompt: Sequence[int], response: list[int], temperature: float) -> Any:
    """Of each response token, [T], from one forward pass without cache, padding or batch."""
    logits_TV = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return logprobs_TV[torch.arange(len(response)), torch.tensor(response)].numpy()


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen2"), FAMILIES["qwen2"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward_pass(family: str, temperature: float, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, FAMILIES[family], eos=[3, 7, 11])
    groups = sampled(opened(checkpoint), [REQUESTS], Sampling(temperature, 12))
    model = load_model(checkpoint, "cpu")
    lengths = set()
    for group in REQUESTS:
        for sample in groups[group.group_id].samples[:2]:
            response = sample.token_ids.tolist()
            plain_T = plain_logprobs(model, group.prompt_token_ids, response, temperature)
            assert np.abs(sample.logprobs - plain_T).max() <= 1e-5
            assert (sample.logprobs <= 0).all()
            lengths.add(len(response))
    assert len(lengths) > 1  # rows left the batch at different times


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, FAMILIES[family], eos=[3, 7, 11])
    together = tokens(sampled(opened(checkpoint), [REQUESTS]))
    engine = opened(checkpoint, max_rows_per_batch=1)  # a group is a batch
    assert tokens(sampled(engine, [REQUESTS])) == together
    assert tokens(sampled(engine, [REQUESTS[:1], REQUESTS[1:4], REQUESTS[4:]])) == together
    for sample, seed in enumerate(REQUESTS[0].seeds):
        alone = sampled(engine, [[Request(0, REQUESTS[0].prompt_token_ids, [seed])]])
        assert tokens(alone)[0] == [together[0][sample]]


def test_a_shard_gives_the_same_bytes_alone_and_among_others(qwen2: Path) -> None:
    engine = opened(qwen2, max_rows_per_batch=8)
    first, second = REQUESTS[:3], REQUESTS[3:]
    both = sampled(engine, [first, second])
    assert digest({group.group_id: both[group.group_id] for group in second}) == digest(
        sampled(engine, [second])
    )
    assert digest(sampled(engine, [second, first])) == digest(both)
    assert digest(sampled(opened(qwen2, max_rows_per_batch=8), [first, second])) == digest(both)


def test_another_process_gives_the_same_bytes(qwen2: Path) -> None:
    here = Path(__file__)
    script = (
        f"import sys, torch; from pathlib import Path; sys.path.insert(0, {str(here.parent)!r})\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"from {here.stem} import REQUESTS, digest, opened, sampled\n"
        f"print(digest(sampled(opened(Path({str(qwen2)!r})), [REQUESTS])))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(sampled(opened(qwen2), [REQUESTS]))


def test_a_reloaded_engine_gives_the_bytes_of_a_fresh_one(qwen2: Path, tmp_path: Path) -> None:
    later = write_checkpoint(tmp_path, FAMILIES["qwen2"], seed=1)
    engine = opened(qwen2)
    before = digest(sampled(engine, [REQUESTS]))
    engine.load(later)
    assert digest(sampled(engine, [REQUESTS])) == digest(sampled(opened(later), [REQUESTS])) != before
    engine.load(qwen2)
    assert digest(sampled(engine, [REQUESTS])) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_memory_give_the_bytes_of_a_checkpoint(family: str, tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", FAMILIES[family])
    two = write_checkpoint(tmp_path / "two", FAMILIES[family], seed=1)
    model: Any = load_model(two, "cpu")
    engine = TransformersEngine("cpu", 64)
    engine.take(Weights(load_model(one, "cpu"), one))
    assert digest(sampled(engine, [REQUESTS])) == digest(sampled(opened(one), [REQUESTS]))
    # Of the learner's model only the tensors are used: not its modules, which are in training in part.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    engine.take(Weights(model, two))
    assert digest(sampled(engine, [REQUESTS])) == digest(sampled(opened(two), [REQUESTS]))
    assert engine._model is not None
    pairs = zip(engine._model.parameters(), model.parameters(), strict=True)
    assert all(own.data_ptr() == given.data_ptr() for own, given in pairs)  # nothing was copied
    alone = TransformersEngine("cpu", 64)
    alone.take(Weights(model, two))  # an engine that has not been opened before
    assert digest(sampled(alone, [REQUESTS])) == digest(sampled(opened(two), [REQUESTS]))


@pytest.mark.parametrize("is_open", [False, True])
def test_an_adapter_is_merged_and_the_learner_s_weights_stay(
    qwen2: Path, tmp_path: Path, is_open: bool
) -> None:
    pytest.importorskip("peft")
    model = load_model(qwen2, "cpu")
    adapter = add_adapter(model, LoraConfig(rank=4, alpha=8, modules_to_save=["norm"]), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    for name, content in policy_files(model, qwen2):
        files.write_chunks(tmp_path / name, content)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = opened(qwen2) if is_open else TransformersEngine("cpu", 64)
    for _ in range(2):
        engine.take(Weights(model, qwen2))
        assert digest(sampled(engine, [REQUESTS])) == digest(sampled(opened(tmp_path), [REQUESTS]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_engine_that_leaves_lets_go_of_the_learner_s_weights(qwen2: Path) -> None:
    engine, model = TransformersEngine("cpu", 64), load_model(qwen2, "cpu")
    engine.take(Weights(model, qwen2))
    engine.release()
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert all(each() is None for each in held)


def test_any_of_several_eos_ids_ends_a_response(tmp_path: Path) -> None:
    eos_ids = list(range(0, VOCABULARY, 5))
    engine = opened(write_checkpoint(tmp_path, FAMILIES["llama"], eos=eos_ids))
    groups = sampled(engine, [REQUESTS], Sampling(1.0, 6))
    samples = [sample for group in groups.values() for sample in group.samples]
    for sample in samples:
        ended = [token in eos_ids for token in sample.token_ids.tolist()]
        assert not any(ended[:-1])
        assert sample.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ended) == 6
    assert {int(sample.token_ids[-1]) for sample in samples} >= {0, 5}  # the pad id of nothing, and others
    assert {len(sample.token_ids) for sample in samples} >= {1, 6}


def test_without_an_eos_id_every_response_is_as_long_as_allowed(tmp_path: Path) -> None:
    config = LlamaConfig(**(SIZES | {"eos_token_id": None}))
    groups = sampled(opened(write_checkpoint(tmp_path, config, eos=None)), [REQUESTS], Sampling(1.0, 5))
    for group in groups.values():
        assert [len(sample.token_ids) for sample in group.samples] == [5] * NUM_SAMPLES
        assert {sample.finish_reason for sample in group.samples} == {"length"}


def test_samples_differ_and_have_the_promised_types(qwen2: Path) -> None:
    for group in sampled(opened(qwen2), [REQUESTS], Sampling(1.0, 20)).values():
        assert len({tuple(sample.token_ids.tolist()) for sample in group.samples}) == NUM_SAMPLES
        for sample in group.samples:
            assert sample.token_ids.dtype == np.dtype(np.int32)
            assert sample.logprobs.dtype == np.dtype(np.float32)
            assert len(sample.token_ids) == len(sample.logprobs)


def test_samples_keep_no_padding_in_memory(qwen2: Path) -> None:
    groups = sampled(opened(qwen2), [REQUESTS], Sampling(1.0, 20)).values()
    arrays = [sample.token_ids for group in groups for sample in group.samples]
    held = {id(array.base): array.base for array in arrays if array.base is not None}
    assert held
    assert sum(base.size for base in held.values()) == sum(map(len, arrays))


def test_groups_of_different_sizes(qwen2: Path) -> None:
    requests = [request(0, 5, num_samples=1), request(1, 5, num_samples=7), request(2, 4, num_samples=2)]
    groups = sampled(opened(qwen2), [requests])
    assert [len(groups[group_id].samples) for group_id in range(3)] == [1, 7, 2]
    assert tokens(groups)[1] == tokens(sampled(opened(qwen2), [requests[1:2]]))[1]


def test_every_token_is_reported(qwen2: Path) -> None:
    reports: list[tuple[int, int]] = []
    groups = list(
        opened(qwen2, max_rows_per_batch=8).sample([REQUESTS], WARM, lambda *each: reports.append(each))
    )
    samples = [sample for group in groups for sample in group.samples]
    assert [sum(each) for each in zip(*reports, strict=True)] == [
        sum(len(sample.token_ids) for sample in samples),
        len(samples),
    ]
    # Those that end early are counted then, not at the end of their batch.
    assert any(0 < ended < tokens for tokens, ended in reports)


def test_greedy_takes_the_likeliest_token_and_its_logprob_at_temperature_one(qwen2: Path) -> None:
    groups = sampled(opened(qwen2), [REQUESTS[:2]], Sampling(0.0, 6))
    model = load_model(qwen2, "cpu")
    for group in REQUESTS[:2]:
        first, *others = groups[group.group_id].samples
        response: list[int] = []
        while len(response) < 6 and 3 not in response:
            logits_V = model(torch.tensor([[*group.prompt_token_ids, *response]])).logits[0, -1]
            response.append(int(logits_V.argmax()))
        assert first.token_ids.tolist() == response
        assert all(other.token_ids.tolist() == response for other in others)
        plain_T = plain_logprobs(model, group.prompt_token_ids, response, temperature=1.0)
        assert np.abs(first.logprobs - plain_T).max() <= 1e-5


def test_frequencies_follow_the_softmax(tmp_path: Path) -> None:
    config = Qwen2Config(**(SIZES | {"vocab_size": 5, "eos_token_id": None, "pad_token_id": None}))
    checkpoint = write_checkpoint(tmp_path, config, eos=None)
    group = Request(0, [1, 4, 2], [group_seed(0, 0, 0) + sample for sample in range(4000)])
    samples = sampled(opened(checkpoint), [[group]], Sampling(0.7, 1))[0].samples
    observed_V = np.bincount([int(sample.token_ids[0]) for sample in samples], minlength=5)
    with torch.no_grad():
        logits_V = load_model(checkpoint, "cpu")(torch.tensor([[1, 4, 2]])).logits[0, -1]
    expected_V = 4000 * torch.softmax(logits_V / 0.7, dim=-1).numpy()
    assert expected_V.min() > 5  # chi-square needs that many
    # Four degrees of freedom: 18.5 is exceeded once in a thousand seeds.
    assert ((observed_V - expected_V) ** 2 / expected_V).sum() < 18.5


@pytest.mark.parametrize("max_rows_per_batch", [64, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_a_plain_forward_pass(family: str, max_rows_per_batch: int, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, FAMILIES[family])
    engine, model = opened(checkpoint, max_rows_per_batch), load_model(checkpoint, "cpu")
    sequences = [group.prompt_token_ids for group in REQUESTS]  # of 9, 1, 17, 3, 9 and 2 tokens
    scores = engine.logprobs(sequences)
    assert [len(logprobs) for logprobs in scores] == [8, 0, 16, 2, 8, 1]
    for sequence, logprobs in zip(sequences, scores, strict=True):
        assert logprobs.dtype == np.dtype(np.float32)
        if len(sequence) > 1:
            plain_T = plain_logprobs(model, sequence[:1], list(sequence[1:]), temperature=1.0)
            assert np.abs(logprobs - plain_T).max() <= 1e-5
    assert engine.logprobs([]) == []


def test_score_gives_the_logprobs_that_were_sampled(qwen2: Path) -> None:
    engine = opened(qwen2)
    for group in sampled(engine, [REQUESTS]).values():
        prompt = REQUESTS[group.group_id].prompt_token_ids
        scores = engine.logprobs([[*prompt, *sample.token_ids.tolist()] for sample in group.samples])
        for sample, logprobs in zip(group.samples, scores, strict=True):
            assert np.abs(sample.logprobs - logprobs[len(prompt) - 1 :]).max() <= 1e-5


def test_release_drops_the_model_and_load_brings_it_back(qwen2: Path) -> None:
    engine = opened(qwen2)
    before = digest(sampled(engine, [REQUESTS]))
    assert engine._model is not None
    model = weakref.ref(engine._model)
    engine.release()
    gc.collect()
    assert model() is None
    engine.load(qwen2)
    assert digest(sampled(engine, [REQUESTS])) == before


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_cut_distribution_is_refused(qwen2: Path, cut: dict[str, Any]) -> None:
    with pytest.raises(
        EngineError, match=r"generate: the transformers engine samples from the whole distribution; .* vllm$"
    ):
        sampled(opened(qwen2), [REQUESTS], Sampling(1.0, 4, **cut))


def test_plan_batches_keeps_groups_whole_and_sorts_by_prompt_length() -> None:
    requests = [request(0, 9, 2), request(1, 1, 2), request(2, 5, 7), request(3, 9, 1), request(4, 2, 2)]
    batches = [[group.group_id for group in batch] for batch in plan_batches(requests, 4)]
    # Lengths 1, 2, 5, 9, 9 with 2, 2, 7, 2, 1 samples: 2 + 2, then 7 alone, then 2 + 1.
    assert batches == [[1, 4], [2], [0, 3]]
    assert plan_batches([], 4) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "generate: group 5: the prompt has no tokens; at least one is needed"),
        ([4, VOCABULARY], "generate: group 5: prompt token outside the model's vocabulary of 40"),
        ([4, -1], "generate: group 5: prompt token outside the model's vocabulary of 40"),
        (
            [4] * 53,
            "generate: group 5: 53 prompt tokens [+] max_new_tokens 12 do not fit the .* context of 64",
        ),
    ],
)
def test_a_request_the_model_cannot_take_is_named(qwen2: Path, prompt: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sampled(opened(qwen2), [[Request(5, prompt, [1, 2])]])


def test_the_whole_context_can_be_used(qwen2: Path) -> None:
    groups = sampled(opened(qwen2), [[Request(5, [4] * 52, [1, 2])]])
    assert [len(sample.token_ids) > 0 for sample in groups[5].samples] == [True, True]
