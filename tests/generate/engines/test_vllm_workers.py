"""Real vLLM in a process of its own, as execution.engines has it: what it samples, and what does not arrive.

The process is one for all tests but the last: it takes longer to open than all else. Which fault a job meets
there comes with the job.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import Grpo
from tests.generate.engines.test_vllm_engine import (
    LONG,
    MAX_LENGTH,
    MAX_NEW_TOKENS,
    SHORT,
    expected_logprobs,
    requests,
    write_checkpoint,
    write_project,
)

from grpo.errors import EngineError
from grpo.execute import Checkpoint, LocalProcesses, Worker
from grpo.generate import engine_pool
from grpo.generate.engines.protocol import Sampling
from grpo.generate.rollouts import SamplingTask
from grpo.generate.worker import EngineSettings, ShardJob, ShardResult, open_worker
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import WeightCheck, check_sequences, measure

pytest.importorskip("vllm")
import vllm

from grpo.generate.engines import vllm_engine

pytestmark = pytest.mark.xdist_group("vllm")

VOCABULARY = 258


def skipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vllm_engine.VllmEngine, "_reload", lambda engine, **source: None)


def stale_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vllm_engine, "_repack_head", lambda model: None)  # vLLM's reload as it is


def kept_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vllm.LLM, "reset_prefix_cache", lambda llm: True)


Fault = Callable[[pytest.MonkeyPatch], None]


def open_faulty(settings: EngineSettings) -> Callable[[tuple[Fault | None, ShardJob]], ShardResult]:
    """What the product opens; each of its jobs comes with what vLLM does wrong meanwhile."""
    sample = open_worker(settings)

    def work(job: tuple[Fault | None, ShardJob]) -> ShardResult:
        fault, shard = job
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None:
                fault(patch)
            result: ShardResult = sample(shard)
            return result

    return work


def open_with_kept_cache(settings: EngineSettings) -> Callable[[ShardJob], ShardResult]:
    """The same, for a run: it is wrong in all of them."""
    work = open_faulty(settings)
    return lambda job: work((kept_cache, job))


def check_of(folder: Path) -> WeightCheck:
    return measure(Reader(load_model(folder, "cpu")), check_sequences(LONG, 512))


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The starting policy, and one that is far from it."""
    folder = tmp_path_factory.mktemp("vllm")
    return [write_checkpoint(folder / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def worker(policies: list[Path]) -> Iterator[Worker]:
    start, making = policies[0], partial(vllm_engine.VllmEngine, {}, MAX_LENGTH)
    settings = EngineSettings(making, Checkpoint.of(start), check_of(start), VOCABULARY, "auto", 1)
    worker = LocalProcesses(partial(open_faulty, settings)).start()
    yield worker
    worker.kill()


def shard_job(policy: Path, prompts: list[list[int]], source: Path | None) -> ShardJob:
    """A shard of `policy`, whose weights are in `source`; None: the engine has been sent it."""
    wanted = requests(prompts)
    task = SamplingTask(
        table="rollouts",
        iteration=0,
        policy=0,
        rows={request.group_id: {"prompt_id": request.group_id} for request in wanted},
        texts={request.group_id: "" for request in wanted},
        requests={request.group_id: request for request in wanted},
        shards={"part": range(len(wanted))},
        groups_per_round=len(wanted),
        sampling=Sampling(1.0, MAX_NEW_TOKENS),
    )
    return ShardJob(task, policy.name, None if source is None else Checkpoint.of(source), check_of(policy))


def sampled(
    worker: Worker,
    policy: Path,
    prompts: list[list[int]],
    fault: Fault | None = None,
    source: Path | None = None,
) -> ShardResult:
    """A shard of `policy`, whose weights are in `source` where that is another folder."""
    worker.submit((fault, shard_job(policy, prompts, source or policy)))
    result: ShardResult = worker.result()
    return result


def distance(result: ShardResult, policy: Path) -> float:
    """The most that a log-prob of the shard is from the learner's."""
    rows = pq.read_table(io.BytesIO(result.made.content)).to_pylist()
    assert rows
    return max(
        float(
            np.abs(
                expected_logprobs(policy, row["prompt_token_ids"], row["response_token_ids"], 1.0)
                - row["old_logprobs"]
            ).max()
        )
        for row in rows
    )


def test_shards_are_those_of_the_policies_that_are_asked_for(worker: Worker, policies: list[Path]) -> None:
    for policy in (policies[0], policies[1], policies[0]):
        result = sampled(worker, policy, SHORT + LONG)
        assert (result.precision, result.made.rows) == ("float32", 4 * len(SHORT + LONG))
        assert result.difference is not None
        assert result.difference < 1e-5
        assert distance(result, policy) < 1e-5
    assert sampled(worker, policies[0], SHORT).difference is None  # it has it already


def lacking_a_layer(policy: Path, folder: Path) -> Path:
    shutil.copytree(policy, folder)
    tensors = load_file(folder / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
    assert 0 < len(rest) < len(tensors)
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


STALE = "the engine does not compute the policy as the learner does: .*; nothing was sampled"
CACHE = "vLLM kept its prefix cache over new weights; nothing was sampled"
WHAT = {
    "an engine skipped": (skipped, STALE),
    "a stale head": (stale_head, STALE),
    "a layer not sent": (None, STALE),
    "a kept prefix cache": (kept_cache, CACHE),
}


@pytest.mark.parametrize("what", WHAT)
def test_what_did_not_arrive_is_found_before_anything_is_sampled(
    worker: Worker, policies: list[Path], tmp_path: Path, what: str
) -> None:
    old, new = policies
    fault, message = WHAT[what]
    source = lacking_a_layer(new, tmp_path / "lacking") if fault is None else new
    sampled(worker, old, LONG)
    with pytest.raises(EngineError, match=message) as found:
        sampled(worker, new, LONG, fault, source)
    assert found.value.exit_code == 8
    result = sampled(worker, new, LONG)  # the engine took no harm, and knows that it has not got it
    assert result.difference is not None
    assert result.difference < 1e-5
    assert distance(result, new) < 1e-5


@pytest.mark.slow
def test_a_run_in_which_it_keeps_its_prefix_cache_ends_and_is_resumed(
    policies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    """A policy behind: the update, which reads another policy than was sampled from, would not see it."""
    monkeypatch.chdir(write_project(tmp_path / "p", policies[0], 8, {}))
    prompts = [{"prompt": f"{n}+1=" * 50} for n in range(6)]  # 200 tokens: a block of 128 and more
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    changes = ("execution={engines: {count: 1}}", "generate.policy_lag=1", "iterations=3")
    command = ("run", *(part for change in changes for part in ("--set", change)))
    with monkeypatch.context() as patch:
        patch.setattr(engine_pool, "opener", lambda settings: partial(open_with_kept_cache, settings))
        code, _, err = grpo(*command)
    assert code == 8
    assert err.splitlines()[-1] == f"error: generate: {CACHE}"
    assert not Path("artifacts/v/iteration=000002/rollouts").exists()  # the first that are not of policy 0
    assert Path("artifacts/v/iteration=000001/rollouts").exists()
    code, _, err = grpo(*command)
    assert code == 0, err
    code, out, err = grpo("sql", "select mismatch_mean, ratio_max from updates where iteration = 0", "--json")
    assert code == 0, err
    [row] = json.loads(out)
    assert row["mismatch_mean"] < 1e-4
    assert abs(row["ratio_max"] - 1) < 1e-3
