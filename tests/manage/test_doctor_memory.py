"""Memory by numbers: none of it is needed to judge. And what else doctor asks of a machine."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.update.examples import configuration

from grpo.artifacts import ActiveRun
from grpo.config import Config, ExecutionConfig
from grpo.console import Console
from grpo.manage.doctor import machine
from grpo.manage.doctor.memory import changed_value, check_gpu, way_out
from grpo.manage.doctor.peak import LIBRARIES, Facts, peak_of
from grpo.manage.doctor.report import Report
from grpo.models import device
from grpo.models.size import Shape

GIB = 2**30
SMALL = Shape(24, 896, 4864, 896, 128, 151936, tied=True)
LARGE = Shape(28, 3584, 18944, 3584, 512, 152064, tied=False)
HUGE = Shape(80, 8192, 28672, 8192, 1024, 128256, tied=False)
LORA: dict[str, Any] = {"lora": {"rank": 16, "alpha": 32.0}}


def config_of(share: float = 0.85, engine: str = "vllm", **update: Any) -> Config:
    config = configuration(**update)
    options = {"gpu_memory_utilization": share, "dtype": "bfloat16"} if engine == "vllm" else {}
    given = {"engine": engine, "engine_options": options, "max_new_tokens": 1024, "samples_per_prompt": 8}
    return config.model_copy(update={"generate": config.generate.model_copy(update=given)})


def facts_of(shape: Shape, *, on_gpu: bool = True, reference: bool = True) -> Facts:
    return Facts(shape, shape.parameters, shape.parameters * reference, 0, 512, on_gpu, 80 * GIB)


@pytest.mark.parametrize(
    ("config", "shape", "free", "level", "note"),
    [
        (config_of(), SMALL, 80, "ok", ""),
        (config_of(), LARGE, 80, "failed", "GPU memory: 1"),
        (config_of(), SMALL, 60, "warning", "68.0 GiB will be asked for and other processes hold 20.0 GiB; "),
        (config_of(engine="transformers"), SMALL, 40, "ok", ""),
        (config_of(gradient_checkpointing=False, precision="float32"), SMALL, 40, "warning", ""),
        (config_of(**LORA), LARGE, 80, "ok", ""),
    ],
)
def test_memory_of_a_gpu(config: Config, shape: Shape, free: int, level: str, note: str) -> None:
    report = Report("tiny", Path())
    check_gpu(report, "H", config, facts_of(shape, reference=config.update.lora is None), free * GIB)
    found = report.checks[0]
    assert (found.level, found.exit_code) == (level, 7 if level == "failed" else 0)
    assert found.note.startswith(note)


def test_the_way_out_is_in_the_warning() -> None:
    report = Report("tiny", Path())
    config = config_of(engine="transformers", gradient_checkpointing=False, precision="float32")
    check_gpu(report, "H", config, facts_of(SMALL), 40 * GIB)
    [found] = report.checks
    assert "end some of them first, or set update.gradient_checkpointing: true, which takes " in found.note
    report = Report("tiny", Path())
    check_gpu(report, "H", config_of(), facts_of(SMALL), 60 * GIB)
    assert report.checks[0].note.endswith("or lower generate.engine_options.gpu_memory_utilization")


def test_gradients_are_checkpointed_where_memory_asks_for_it() -> None:
    """7B under LoRA: 16,384 tokens keep 63 GiB in bfloat16 (28 x (26 x 3584 + ...)) beside 27 of weights."""
    for free, again in ((200, False), (80, True)):
        report = Report("tiny", Path())
        check_gpu(report, "H", config_of(**LORA), facts_of(LARGE, reference=False), free * GIB)
        assert report.checks[0].needed.endswith("computed again backwards") == again


def test_what_the_engine_has_room_for() -> None:
    report = Report("tiny", Path())
    check_gpu(report, "H", config_of(0.01), facts_of(SMALL), 80 * GIB)
    check = report.checks[1]
    assert (check.level, check.exit_code) == ("failed", 7)
    wanted = "0.9 GiB of engine weights and 18 MiB of a sequence, 0.8 GiB for them;"
    assert check.note.startswith(f"GPU memory: {wanted} raise gpu_memory_utilization or ")
    # 12,288 bytes of a token, 1,536 tokens: 18 MiB a sequence; 0.02 x 80 GiB less 0.92 are 38 of them.
    report = Report("tiny", Path())
    check_gpu(report, "H", config_of(0.02), facts_of(SMALL), 80 * GIB)
    check = report.checks[1]
    assert check.found.endswith(" of weights, 38 sequences of 1,536 tokens beside them")
    assert "256 are asked for at once" in check.note
    assert check.note.endswith("generate.engine_options: {max_num_seqs: 38} avoids that")


def test_the_cache_that_vllm_is_told_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the rest of its share: what 512 sequences of 1,536 tokens can use, 9.0 GiB of 68."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * GIB, 80 * GIB))
    config = config_of()
    options = {"dtype": "bfloat16"}
    config = config.model_copy(
        update={"generate": config.generate.model_copy(update={"engine_options": options})}
    )
    report = Report("tiny", Path())
    check_gpu(report, "H", config, facts_of(SMALL), 79 * GIB)
    assert report.checks[1].found == "0.9 GiB of weights, 513 sequences of 1,536 tokens beside them"
    assert peak_of(config, facts_of(SMALL)).total < 40 * GIB


@pytest.mark.parametrize("there", [4, 6, 8, 12, 16, 24])
def test_the_keys_that_are_named_make_it_fit(there: int) -> None:
    config = config_of(engine="transformers", gradient_checkpointing=False, precision="float32")
    facts = replace(facts_of(Shape(12, 512, 2048, 512, 512, 32000, tied=True)), on_gpu=True)
    text = way_out(config, facts, there * GIB // 4)
    if not text.startswith("set "):
        assert text == "use update.lora, a smaller model, or a machine with more"
        return
    keys = dict(part.split(": ") for part in text[4:].partition(", which takes")[0].split(" and "))
    for key, value in keys.items():
        section, name = key.split(".")
        typed = value == "true" if value in ("true", "false") else int(value)
        part = getattr(config, section).model_copy(update={name: typed})
        config = config.model_copy(update={section: part})
        assert changed_value(config, key) == typed
    assert peak_of(config, facts).total <= there * GIB // 4


def test_on_a_cpu_engine_and_learner_share_what_is_held() -> None:
    config = config_of(engine="transformers", precision="float32", gradient_checkpointing=False)
    parts = peak_of(config, facts_of(SMALL, on_gpu=False)).parts
    size = SMALL.parameters
    assert [parts[name] for name in ("weights", "gradients", "moments", "reference")] == [
        4 * size,
        4 * size,
        8 * size,
        4 * size,
    ]
    assert ("activations" in parts) != ("engine" in parts)  # one behind the other
    vllm = config_of(precision="float32", gradient_checkpointing=False)
    parts = peak_of(vllm, facts_of(SMALL, on_gpu=False)).parts
    assert "activations" in parts
    assert parts["key-value cache"] == 4 * GIB  # it stays open


def test_engines_in_processes_of_their_own_are_counted() -> None:
    config = config_of(engine="transformers", precision="float32", gradient_checkpointing=False)
    alone = peak_of(config, facts_of(SMALL, on_gpu=False)).parts
    execution = ExecutionConfig.model_validate({"engines": {"count": 3}})
    parts = peak_of(config.model_copy(update={"execution": execution}), facts_of(SMALL, on_gpu=False)).parts
    assert parts["engines"] % 3 == 0
    assert parts["engines"] // 3 > 4 * SMALL.parameters + LIBRARIES
    assert parts["weights"] == alone["weights"]
    elsewhere = ExecutionConfig.model_validate({"backend": "ray", "engines": {"count": 3}})
    parts = peak_of(config.model_copy(update={"execution": elsewhere}), facts_of(SMALL, on_gpu=False)).parts
    assert "engines" not in parts


def test_scorers_hold_reward_models_in_place_of_this_process() -> None:
    config = config_of(engine="transformers", precision="float32", gradient_checkpointing=False)
    facts = replace(facts_of(SMALL, on_gpu=False), elsewhere=10**9)
    for backend, held in (("local", 2 * (LIBRARIES + 4 * 10**9)), ("ray", None)):
        execution = ExecutionConfig.model_validate({"backend": backend, "scorers": {"count": 2}})
        parts = peak_of(config.model_copy(update={"execution": execution}), facts).parts
        assert parts.get("scorers") == held


def test_each_replica_of_the_weights_is_counted() -> None:
    def held(**learner: int) -> dict[str, int]:
        execution = ExecutionConfig.model_validate({"learner": learner})
        config = config_of(engine="transformers", precision="float32")
        found = config.model_copy(update={"execution": execution})
        return peak_of(found, facts_of(SMALL, on_gpu=False)).parts

    one, shared, twice = held(), held(processes=4), held(processes=4, replicas=2)
    for name in ("weights", "gradients", "moments", "reference"):
        assert (shared[name], twice[name]) == (one[name], 2 * one[name])
    assert shared["activations"] == twice["activations"]  # each of the four has its own


@pytest.mark.parametrize(
    ("shape", "processes", "gpus", "tokens"), [(LARGE, 4, 1, 16384), (HUGE, 64, 8, 8192)]
)
def test_the_shapes_that_the_page_names_fit(shape: Shape, processes: int, gpus: int, tokens: int) -> None:
    page = (Path(__file__).parents[2] / "docs" / "many-machines.md").read_text()
    learner, engines = {"processes": processes, "gpus": 1}, {"gpus": gpus}
    execution = ExecutionConfig.model_validate({"backend": "ray", "learner": learner, "engines": engines})
    config = config_of(precision="bfloat16", gradient_checkpointing=True, max_tokens_per_batch=tokens)
    options = {**config.generate.engine_options, "tensor_parallel_size": gpus}
    given = {"engine_options": options, "prompts_per_iteration": 512}  # no step is less than a micro-batch
    generate = config.generate.model_copy(update=given)
    config = config.model_copy(update={"execution": execution, "generate": generate})
    report = Report("tiny", Path())
    check_gpu(report, "H", config, facts_of(shape), 80 * GIB)
    assert [check.level for check in report.checks] == ["ok", "ok"]
    parts = peak_of(config, facts_of(shape)).turns[0]
    held, total = 16 * shape.parameters / processes, sum(parts.values())
    row = f"{held / 1e9:.0f} GB each for weights, gradients and moments, {total / 1e9:.0f} GB in all"
    assert f"{processes} GPUs of 80 GB: {row}" in page


# What else is asked of the machine


def looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, cc: str | None, path: str) -> Report:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    config = configuration()
    report = Report("tiny", tmp_path)
    machine.check_compiler(ActiveRun(tmp_path, config, tmp_path, Console(quiet=True)), report)
    return report


def test_a_gpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = looked(monkeypatch, tmp_path, cc=None, path=str(tmp_path)).checks[0]
    assert (found.level, found.exit_code, found.found) == ("failed", 7, "none")
    assert found.note == (
        "compiler: no gcc and no clang is there; Triton builds its kernels with one: install gcc"
    )
    found = looked(monkeypatch, tmp_path, cc="nocc", path=str(tmp_path)).checks[0]
    assert found.note.startswith("compiler: CC names nocc, which is not there; ")
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    found = looked(monkeypatch, tmp_path, cc=None, path=str(tmp_path)).checks[0]
    assert found.found == str(compiler)


def test_no_gpu_needs_none(tmp_path: Path) -> None:
    report = Report("tiny", tmp_path)
    machine.check_compiler(ActiveRun(tmp_path, configuration(), tmp_path, Console(quiet=True)), report)
    assert report.checks == []


def test_threads_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "gpu_is_there", lambda: False)
    for load, said in ((0.5, False), (64.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        report = Report("tiny", Path())
        machine.check_threads(report)
        assert bool(report.checks) == said
    [check] = report.checks
    assert check.found.endswith(", load 64 on 8 cores")
    assert check.note == "OMP_NUM_THREADS=1 may be many times faster while others work here"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = Report("tiny", Path())
    machine.check_threads(report)
    assert report.checks == []
