"""How vLLM is opened on a GPU, as far as a CPU can tell: the arguments, and the environment."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.errors import EngineError, UsageError
from grpo.generate.engines import vllm_settings
from grpo.models import starter_model
from grpo.models.loading import load_config
from grpo.models.size import Shape, shape_of


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, free_gib: float, total_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bytes_ = (int(free_gib * 2**30), int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: bytes_)
    monkeypatch.setattr(vllm_settings, "default_dtype", lambda: "bfloat16")


@pytest.mark.parametrize(("free", "share"), [(139, 0.85), (100, 0.7), (72, 0.5), (1, 0.0)])
def test_what_is_free_bounds_what_vllm_takes(
    monkeypatch: pytest.MonkeyPatch, free: float, share: float
) -> None:
    """A learner that stayed, or a reward model: vLLM would refuse to open."""
    on_a_gpu(monkeypatch, free, 140)
    assert vllm_settings.defaults(1024)["gpu_memory_utilization"] == pytest.approx(share)


def test_logits_and_batches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 139, 140)
    found = vllm_settings.settings({}, 1024)
    assert found["hf_overrides"] == {"head_dtype": "float32"}
    assert (found["max_num_seqs"], found["enable_sleep_mode"]) == (512, True)
    options = {"hf_overrides": {"rope_scaling": None}, "max_num_seqs": 64, "tensor_parallel_size": 2}
    found = vllm_settings.settings(options, 1024)
    assert found["hf_overrides"] == {"head_dtype": "float32", "rope_scaling": None}
    assert (found["max_num_seqs"], found["distributed_executor_backend"]) == (64, "mp")
    assert vllm_settings.settings({"hf_overrides": {"head_dtype": "model"}}, 1024)["hf_overrides"] == {
        "head_dtype": "model"
    }


# 0.6B as Qwen3: 28 layers, 8 heads of keys of 128.
SMALL = Shape(28, 1024, 3072, 2048, 1024, 151936, tied=True)


def cached(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], length: int = 1024, shape: Shape | None = SMALL
) -> int | None:
    on_a_gpu(monkeypatch, 139, 139)
    opened = vllm_settings.settings(options, length)
    return vllm_settings.cache_bytes(options, opened, shape, 600_000_000, 139 * 2**30)


def test_keys_and_values_take_what_the_sequences_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of vLLM's share: 118 GiB."""
    assert cached(monkeypatch, {}) == 513 * 1024 * 2 * 28 * 1024 * 2  # 56 GiB
    assert (
        cached(monkeypatch, {"dtype": "float32", "max_num_seqs": 63}, 1000) == 64 * 1024 * 2 * 28 * 1024 * 4
    )


@pytest.mark.parametrize(
    ("options", "length", "shape"),
    [
        ({}, 2048, SMALL),  # 112 GiB: vLLM's own profile says how much is left
        ({"gpu_memory_utilization": 0.9}, 1024, SMALL),
        ({"kv_cache_memory_bytes": 2**30}, 1024, SMALL),
        ({"speculative_config": {"method": "ngram"}}, 1024, SMALL),
        ({}, 1024, None),
        ({}, 1024, replace(SMALL, recurrent=True)),
    ],
)
def test_else_vllm_decides(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], length: int, shape: Shape | None
) -> None:
    assert cached(monkeypatch, options, length, shape) is None


def test_vllm_is_opened_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from grpo.generate.engines.vllm_engine import VllmEngine

    starter_model.sketch(tmp_path / "tiny-arithmetic")
    seen: dict[str, Any] = {}

    def opened(checkpoint: Path, settings: dict[str, Any]) -> None:
        seen.update(settings)
        raise RuntimeError("no GPU is there")

    monkeypatch.setattr("grpo.generate.engines.vllm_engine._open", opened)
    with pytest.raises(EngineError, match="no GPU is there"):
        VllmEngine({}, 64).load(tmp_path / "tiny-arithmetic")
    assert "kv_cache_memory_bytes" not in seen
    on_a_gpu(monkeypatch, 139, 140)
    with pytest.raises(EngineError, match="no GPU is there"):
        VllmEngine({}, 64).load(tmp_path / "tiny-arithmetic")
    shape = shape_of(load_config(tmp_path / "tiny-arithmetic"))
    assert shape is not None
    assert seen["kv_cache_memory_bytes"] == 513 * 64 * 2 * shape.layers * shape.keys * 2


def test_the_oldest_vllm_is_one_that_was_read() -> None:
    """A GPU has seen none yet; a release that ran on one may lower this. pip is told the same."""
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    (oldest, newest) = vllm_settings.OLDEST, vllm_settings.NEWEST
    assert (oldest, newest) == ((0, 32), (0, 33))
    assert pyproject["project"]["optional-dependencies"]["vllm"] == ["vllm>=0.32,<0.34"]


def test_a_cpu_has_none_of_it() -> None:
    found = vllm_settings.settings({}, 1024)
    assert not {"hf_overrides", "gpu_memory_utilization", "max_num_seqs"} & found.keys()


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch._dynamo.config, "disable", torch._dynamo.config.disable)
    os.environ.pop("VLLM_NO_USAGE_STATS", None)
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "1", "VLLM_BATCH_INVARIANT": "0"}
    vllm_settings.set_environment()
    assert (os.environ["VLLM_USE_FLASHINFER_SAMPLER"], os.environ["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    with pytest.raises(UsageError, match=r"^VLLM_BATCH_INVARIANT: .*; unset it$"):
        vllm_settings.set_environment()
