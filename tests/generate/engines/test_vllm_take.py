"""Real vLLM on the CPU, given weights in memory: what arrives, and what does not and is found."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.generate.engines.test_vllm_engine import LONG, MAX_LENGTH, SHORT, write_checkpoint, write_project
from tests.pipeline.test_lend import digests, from_disk

from grpo.artifacts import files
from grpo.config import LoraConfig
from grpo.errors import EngineError
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import WeightCheck, check_sequences, measure
from grpo.models.weights import Weights
from grpo.pipeline.resources import Resources
from grpo.update.adapter import add_adapter
from grpo.update.checkpoint import policy_files

pytest.importorskip("vllm")
from grpo.generate.engines import vllm_engine

pytestmark = pytest.mark.xdist_group("vllm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vllm") / "policy", seed=0)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[vllm_engine.VllmEngine]:
    engine = vllm_engine.VllmEngine({}, MAX_LENGTH)
    engine.take(Weights(stepped(checkpoint), checkpoint))  # not those of the checkpoint that it opens at
    scores = engine.logprobs(SHORT[:1] + LONG)
    assert difference(stepped(checkpoint), scores, SHORT[:1] + LONG) < 1e-5
    yield engine
    engine.close()


def stepped(checkpoint: Path, size: float = 1e-2) -> Any:
    """The policy after a step: every weight `size` up or down."""
    model, generator = load_model(checkpoint, "cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * (2 * torch.randint(0, 2, parameter.shape, generator=generator) - 1))
    return model


def adapted(checkpoint: Path) -> Any:
    model = load_model(checkpoint, "cpu")
    add_adapter(model, LoraConfig(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    return model


def difference(model: Any, scores: list[np.ndarray], sequences: list[list[int]]) -> float:
    found = [measure(Reader(model), [sequence]).logprobs[0] for sequence in sequences]
    return WeightCheck(sequences, found).difference(scores)


@pytest.mark.parametrize("make", [stepped, adapted])
@pytest.mark.parametrize("way", ["streamed", "in a folder"])
def test_weights_in_memory_are_bit_for_bit_those_of_a_checkpoint(
    engine: vllm_engine.VllmEngine,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Any],
    way: str,
) -> None:
    model = make(checkpoint)
    for name, content in policy_files(model, checkpoint):
        files.write_chunks(tmp_path / name, content)
    engine.load(tmp_path)
    expected = engine.logprobs(LONG)
    engine.load(checkpoint)
    assert not np.array_equal(engine.logprobs(LONG), expected)
    if way == "in a folder":  # as for workers in processes of their own
        monkeypatch.setitem(engine._settings, "distributed_executor_backend", "mp")
    before = set(Path("/dev/shm").glob("grpo-*"))
    engine.take(Weights(model, checkpoint))
    assert set(Path("/dev/shm").glob("grpo-*")) == before  # gone
    assert np.array_equal(engine.logprobs(LONG), expected)
    with torch.no_grad():  # the engine's are copies: the learner may go on
        for parameter in model.parameters():
            parameter.add_(0.05)
    assert np.array_equal(engine.logprobs(LONG), expected)


def stale_head(engine: vllm_engine.VllmEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vllm_engine, "_repack_head", lambda model: None)  # vLLM's reload as it is


def stale(engine: vllm_engine.VllmEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "_reload", lambda **source: None)


def lacking_one_layer(engine: vllm_engine.VllmEngine, patch: pytest.MonkeyPatch) -> None:
    published = Weights.published

    def some(weights: Weights) -> Any:
        return (pair for pair in published(weights) if ".layers.0." not in pair[0])

    patch.setattr(Weights, "published", some)


@pytest.mark.parametrize("fault", [stale_head, stale, lacking_one_layer])
def test_what_did_not_arrive_is_found(
    engine: vllm_engine.VllmEngine,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[vllm_engine.VllmEngine, pytest.MonkeyPatch], None],
) -> None:
    sequences, later = check_sequences(LONG, 512), stepped(checkpoint)
    checks = [measure(Reader(model), sequences) for model in (load_model(checkpoint, "cpu"), later)]
    weight_sync = WeightSync(engine, print)
    weight_sync.open(checkpoint, checks[0])
    weight_sync.bring("0", checkpoint, checks[0])
    with monkeypatch.context() as patch:
        fault(engine, patch)
        with pytest.raises(EngineError, match="the engine does not compute the policy as the learner does"):
            weight_sync.bring("1", Weights(later, checkpoint), checks[1])
    found = weight_sync.bring("1", Weights(later, checkpoint), checks[1])
    assert found is not None
    assert found < 1e-5


Grpo = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("changes", [[], ["--set", "update.lora={rank: 4, alpha: 8}"]])
def test_what_is_sampled_from_memory_is_what_is_sampled_from_disk(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, changes: list[str]
) -> None:
    monkeypatch.chdir(write_project(tmp_path / "p", checkpoint, 8, {}))
    changes = ["--set", "iterations=3", *changes]
    made = []
    for lend in (Resources.lend, from_disk):
        monkeypatch.setattr(Resources, "lend", lend)
        code, _, err = grpo("run", *changes)
        assert code == 0, err
        made.append(digests(Path("artifacts/v")))
        Path("artifacts/v").rename(f"artifacts/{len(made)}")
    assert made[0] == made[1]
    assert len(made[0]) == 3 * 4


def test_a_prefix_cache_that_was_kept_is_found_by_the_update(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    """By the rollouts themselves, were the engine not to look whether it is gone."""
    monkeypatch.chdir(write_project(tmp_path / "p", checkpoint, 8, {}))
    prompts = [{"prompt": f"{n}+1=" * 50} for n in range(6)]  # 200 tokens: a block of 128 and more
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine.VllmEngine, "_drop_prefixes", lambda engine: None)
        code, _, err = grpo("run")
    assert code == 8
    assert err.splitlines()[-1].startswith("error: update 1: the first log-probs are ")
    assert not Path("artifacts/v/iteration=000001/update").exists()
    code, _, err = grpo("generate", "--iteration", "1", "--force")  # as the error says
    assert code == 0, err
    code, _, err = grpo("run", "--from", "1", "--yes")
    assert code == 0, err
