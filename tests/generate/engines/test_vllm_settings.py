"""How vLLM is opened on a GPU, as far as a CPU can tell: the arguments, and the environment."""

import os

import pytest
import torch

from grpo.errors import UsageError
from grpo.generate.engines import vllm_settings


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, free_gib: float, total_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bytes_ = (int(free_gib * 2**30), int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: bytes_)


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
