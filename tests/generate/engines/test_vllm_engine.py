"""Real vLLM on the CPU, in float32, against the learner's own forward pass.

One engine for all tests but the last ones, and one worker of pytest for all of them (xdist_group): opening it
takes seconds. Prompts of 260 tokens fill two of vLLM's blocks of 128, so that its prefix cache has a say.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import NewTally
from tests.tiny import qwen3_for_vllm

from grpo.artifacts import CHECKPOINT
from grpo.errors import DataError, EngineError, UsageError
from grpo.generate.engines.protocol import Group, Request, Sampling, group_seed
from grpo.generate.weight_sync import WeightSync
from grpo.models import starter_model, weight_check
from grpo.models.loading import context_length, load_model
from grpo.models.logprobs import token_logprobs
from grpo.models.reader import Reader

pytest.importorskip("vllm")
from grpo.generate.engines import vllm_engine, vllm_settings

pytestmark = pytest.mark.xdist_group("vllm")

STOP_IDS = [256, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # 10 of 258: a response of 24 tokens often ends early
K, MAX_NEW_TOKENS, MAX_LENGTH, BATCHED_TOKENS = 4, 24, 300, 512
SHORT = [[51, 43, 52, 61], [49, 43, 49, 61], [97], list(range(60, 80))]
LONG = [[(7 * i + j) % 250 for i in range(260)] for j in range(2)]


def write_checkpoint(folder: Path, seed: int) -> Path:
    """A random Qwen3 with tied embeddings, far from uniform."""
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen3ForCausalLM(qwen3_for_vllm())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    starter_model.build_tokenizer().save_pretrained(folder)
    # All but the end-of-sequence ids must be ignored: with these, all samples of a prompt would be the same.
    greedy = {"eos_token_id": STOP_IDS, "do_sample": True, "temperature": 0.01, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vllm") / "policy", seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vllm") / "other", seed=1)


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Iterator[vllm_engine.VllmEngine]:
    engine = vllm_engine.VllmEngine({"max_num_batched_tokens": BATCHED_TOKENS}, MAX_LENGTH)
    engine.load(checkpoint)
    yield engine
    engine.close()


@pytest.fixture
def engine(opened: vllm_engine.VllmEngine, checkpoint: Path) -> vllm_engine.VllmEngine:
    """The open engine with the weights of `checkpoint`."""
    opened.load(checkpoint)
    return opened


def requests(prompts: Sequence[Sequence[int]], k: int = K, iteration: int = 0) -> list[Request]:
    seeds = [group_seed(3, iteration, group) for group in range(len(prompts))]
    return [Request(g, p, [seeds[g] + s for s in range(k)]) for g, p in enumerate(prompts)]


def sample(
    engine: vllm_engine.VllmEngine, wanted: Sequence[Request], temperature: float = 1.0, **truncation: Any
) -> list[Group]:
    sampling = Sampling(temperature, MAX_NEW_TOKENS, **truncation)
    return sorted(engine.sample([wanted], sampling, lambda *_: None), key=lambda group: group.group_id)


def tokens_of(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[one.token_ids.tolist() for one in group.samples] for group in groups]


def expected_logprobs(
    checkpoint: Path, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> np.ndarray:
    """Of each response token, by the learner's formula and one plain forward pass."""
    model = load_model(checkpoint, "cpu")
    ids = torch.tensor([[*prompt, *response]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs, _ = token_logprobs(logits, ids[0, len(prompt) :], torch.full((len(response),), temperature))
    return logprobs.numpy()


def largest_difference(
    checkpoint: Path, wanted: Sequence[Request], groups: Sequence[Group], temperature: float = 1.0
) -> float:
    return max(
        float(
            np.abs(
                expected_logprobs(checkpoint, request.prompt_token_ids, one.token_ids.tolist(), temperature)
                - one.logprobs
            ).max()
        )
        for request, group in zip(wanted, groups, strict=True)
        for one in group.samples
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_learners_after_temperature(
    engine: vllm_engine.VllmEngine, checkpoint: Path, temperature: float
) -> None:
    wanted = requests([*SHORT, *LONG])
    groups = sample(engine, wanted, temperature)
    assert engine.precision == "float32"
    assert [len(group.samples) for group in groups] == [K] * len(wanted)
    assert largest_difference(checkpoint, wanted, groups, temperature) < 1e-5  # measured: 1e-6


def test_score_is_the_learners_at_temperature_1(engine: vllm_engine.VllmEngine, checkpoint: Path) -> None:
    sequences = [[*LONG[0][:64]], [*LONG[1][:64]]]
    measured = weight_check.measure(Reader(load_model(checkpoint, "cpu")), sequences)
    scores = engine.logprobs(sequences)
    assert [len(row) for row in scores] == [63, 63]
    assert np.abs(np.array(measured.logprobs) - np.stack(scores)).max() < 1e-5


def test_an_exported_policy_is_what_the_learner_has(
    opened: vllm_engine.VllmEngine,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grpo: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.yaml").write_text(
        f"{{run: r, iterations: 1, model: '{checkpoint}', prompts: {{source: arithmetic}}, score: {{rewards:"
        " [{function: length_penalty, arguments: {max_tokens: 4, buffer_tokens: 4}}]}, generate: {engine:"
        " transformers, prompts_per_iteration: 4, max_new_tokens: 8}, update: {learning_rate: 0.01}}"
    )
    for command in (("run",), ("export", "--out", "exported")):
        code, _, err = grpo(*command)
        assert code == 0, err
    opened.load(tmp_path / "exported")
    sequences = [[*LONG[0][:64]], [*LONG[1][:64]]]
    trained, start = (
        np.array(weight_check.measure(Reader(load_model(folder, "cpu")), sequences).logprobs)
        for folder in (tmp_path / "exported", checkpoint)
    )
    scores = np.stack(opened.logprobs(sequences))
    assert np.abs(trained - scores).max() < 1e-5
    assert np.abs(start - scores).max() > 1e-2  # it did train


def test_k_samples_differ_and_each_seed_gives_its_own(engine: vllm_engine.VllmEngine) -> None:
    [group] = sample(engine, requests(SHORT[:1], k=8))
    assert len({tuple(one.token_ids) for one in group.samples}) == 8
    # Sample 3 of the group is what its seed gives alone: seeds are consecutive.
    [request] = requests(SHORT[:1], k=8)
    [alone] = sample(engine, [Request(0, SHORT[0], [request.seeds[3]])])
    assert alone.samples[0].token_ids.tolist() == group.samples[3].token_ids.tolist()
    [elsewhere] = sample(engine, requests(SHORT[:1], k=8, iteration=1))
    assert not {tuple(one.token_ids) for one in group.samples} & {
        tuple(one.token_ids) for one in elsewhere.samples
    }


def test_an_identical_call_gives_identical_bytes(engine: vllm_engine.VllmEngine, checkpoint: Path) -> None:
    wanted = requests([*SHORT, *LONG])
    first = sample(engine, wanted)
    engine.load(checkpoint)  # drops the prefix cache: a warm one is another call
    second = sample(engine, wanted)
    assert tokens_of(first) == tokens_of(second)
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one.samples, two.samples, strict=True):
            assert a.logprobs.tobytes() == b.logprobs.tobytes()


def test_half_of_the_requests_give_the_same_tokens(engine: vllm_engine.VllmEngine, checkpoint: Path) -> None:
    wanted = requests([*SHORT, *LONG])
    whole = sample(engine, wanted)[3:]
    engine.load(checkpoint)
    half = sample(engine, wanted[3:])
    assert tokens_of(half) == tokens_of(whole)
    for one, two in zip(half, whole, strict=True):
        for a, b in zip(one.samples, two.samples, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_every_end_of_sequence_id_stops_and_is_kept(engine: vllm_engine.VllmEngine) -> None:
    groups = sample(engine, requests(SHORT, k=16))
    samples = [one for group in groups for one in group.samples]
    ends = {int(one.token_ids[-1]) for one in samples if one.finish_reason == "stop"}
    assert len(ends) >= 3  # not only the tokenizer's own
    assert ends <= set(STOP_IDS)
    for one in samples:
        assert not set(one.token_ids[:-1].tolist()) & set(STOP_IDS)
        if one.finish_reason == "length":
            assert len(one.token_ids) == MAX_NEW_TOKENS
    assert {one.finish_reason for one in samples} == {"stop", "length"}


def test_truncated_sampling_stores_the_logprobs_of_what_is_left(engine: vllm_engine.VllmEngine) -> None:
    [group] = sample(engine, requests(SHORT[:1]), top_k=1)
    assert len({tuple(one.token_ids) for one in group.samples}) == 1
    assert all((one.logprobs == 0).all() for one in group.samples)  # log 1: nothing else could be drawn


def test_more_prompt_tokens_than_one_batch_holds(engine: vllm_engine.VllmEngine, checkpoint: Path) -> None:
    # 16 x 100 tokens > 512: with prefills split in chunks, vLLM on a CPU would die of per-request seeds.
    prompts = [[(11 * i + j) % 250 for i in range(100)] for j in range(16)]
    assert sum(map(len, prompts)) > BATCHED_TOKENS
    wanted = requests(prompts)
    before, started = engine.tail.seconds, time.perf_counter()
    assert largest_difference(checkpoint, wanted, sample(engine, wanted)) < 1e-5
    # What began last ends last, with under half of all under way.
    assert 0 < engine.tail.seconds - before < time.perf_counter() - started


def test_a_response_that_does_not_fit_is_refused_not_cut(engine: vllm_engine.VllmEngine) -> None:
    # 300 positions: 277 + 24 do not fit. vLLM would end such a response after 23 tokens, as if by `length`.
    prompt = [i % 250 for i in range(MAX_LENGTH - MAX_NEW_TOKENS + 1)]
    with pytest.raises(DataError, match=r"277 prompt tokens \+ max_new_tokens 24 do not fit the model's"):
        sample(engine, requests([prompt]))
    with pytest.raises(DataError, match="prompt token outside the model's vocabulary of 258"):
        sample(engine, requests([[258]]))


def test_groups_come_as_they_finish_and_tokens_are_counted(engine: vllm_engine.VllmEngine) -> None:
    counted: list[tuple[int, int]] = []
    shards = [requests(SHORT)[:2], requests(SHORT)[2:]]
    groups = list(engine.sample(shards, Sampling(1.0, MAX_NEW_TOKENS), lambda *each: counted.append(each)))
    assert sorted(group.group_id for group in groups) == [0, 1, 2, 3]
    samples = [one for group in groups for one in group.samples]
    assert [sum(each) for each in zip(*counted, strict=True)] == [
        sum(len(one.token_ids) for one in samples),
        len(samples),
    ]


def test_what_is_left_is_aborted_when_nobody_asks(engine: vllm_engine.VllmEngine) -> None:
    groups = engine.sample([requests(SHORT)], Sampling(1.0, MAX_NEW_TOKENS), lambda *_: None)
    next(groups)
    groups.close()  # type: ignore[attr-defined]
    assert not engine._llm.llm_engine.has_unfinished_requests()  # type: ignore[union-attr]


def test_new_weights_and_no_prefix_of_the_old_ones(
    engine: vllm_engine.VllmEngine, checkpoint: Path, other: Path
) -> None:
    wanted = requests(LONG)
    before = sample(engine, wanted)
    assert largest_difference(checkpoint, wanted, before) < 1e-5
    engine.load(other)
    after = sample(engine, wanted)
    assert largest_difference(other, wanted, after) < 1e-5
    assert tokens_of(before) != tokens_of(after)


def test_the_prefix_cache_would_have_kept_the_old_weights(
    engine: vllm_engine.VllmEngine, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the test above is for: without the reset, prompts seen before keep the keys of the old policy.
    wanted = requests(LONG)
    sample(engine, wanted)
    monkeypatch.setattr(engine, "_drop_prefixes", lambda: None)
    engine.load(other)
    assert largest_difference(other, wanted, sample(engine, wanted)) > 0.01


def test_a_prefix_cache_that_is_kept_is_found(
    engine: vllm_engine.VllmEngine, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests([*LONG, *SHORT])
    sample(engine, wanted)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(EngineError, match="vLLM kept its prefix cache over new weights"):
            engine.load(other)
    engine.load(other)
    assert largest_difference(other, wanted, sample(engine, wanted)) < 1e-5


def test_the_weight_check_catches_a_stale_output_head_and_the_cure_passes(
    engine: vllm_engine.VllmEngine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(checkpoint, "cpu")
    policy_check = weight_check.measure(
        Reader(model), weight_check.check_sequences(LONG, context_length(model.config))
    )
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "_repack_head", lambda model: None)  # vLLM's reload as it is
        with pytest.raises(
            EngineError, match="does not compute a perturbed copy as the learner does"
        ) as stale:
            WeightSync(engine, print).open(checkpoint, policy_check)
    assert stale.value.exit_code == 8
    weight_sync = WeightSync(engine, print)
    weight_sync.open(checkpoint, policy_check)
    difference = weight_sync.bring("policy 0", checkpoint, policy_check)
    assert difference is not None
    assert difference < 1e-5


def test_a_small_step_is_followed(engine: vllm_engine.VllmEngine, checkpoint: Path, tmp_path: Path) -> None:
    """A change of 1e-5 of each weight is below the tolerance, yet moves bits: it must pass."""
    small = tmp_path / "small"
    small.mkdir()
    for path in checkpoint.iterdir():
        (small / path.name).write_bytes(path.read_bytes())
    tensors = {
        name: tensor * (1 + 1e-5) for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    models = {path: load_model(path, "cpu") for path in (checkpoint, small)}
    sequences = weight_check.check_sequences(LONG, 512)
    checks = {path: weight_check.measure(Reader(model), sequences) for path, model in models.items()}
    weight_sync = WeightSync(engine, print)
    weight_sync.open(checkpoint, checks[checkpoint])
    weight_sync.bring("0", checkpoint, checks[checkpoint])
    assert weight_sync.bring("1", small, checks[small]) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "max_num_seq: vLLM has no such engine argument; did you mean max_num_seqs?"),
        ({"seed": 1}, "seed: the pipeline sets it; leave it out"),
        ({"trust_remote_code": True}, "trust_remote_code: the pipeline sets it; leave it out"),
        ({"data_parallel_size": 2}, "data_parallel_size: 2, but the engine runs in this process"),
        ({"max_num_seqs": "many"}, "max_num_seqs: 'many': Input should be a valid integer"),
        ({"dtype": "floaty"}, "dtype: 'floaty': Input should be"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill: vLLM cannot split prefills with seeds"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: 0; 1 or more is right"),
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "uni"},
            "uni is one worker, but tensor_parallel_size 2 needs more; use mp",
        ),
    ],
)
def test_engine_options_are_checked_against_vllms_own(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=r"^generate\.engine_options\.") as refused:
        vllm_engine.VllmEngine(options, MAX_LENGTH)
    assert message in str(refused.value)


def test_the_listed_options_are_vllms() -> None:
    vllm_engine.check_options(
        {
            "tensor_parallel_size": 2,
            "data_parallel_size": 1,
            "gpu_memory_utilization": 0.5,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
            "dtype": "bfloat16",
            "enforce_eager": True,
            "quantization": "fp8",
        }
    )


def test_a_value_that_only_vllms_configuration_refuses_is_a_usage_error(checkpoint: Path) -> None:
    engine = vllm_engine.VllmEngine({"max_num_seqs": 4, "gpu_memory_utilization": 5.0}, MAX_LENGTH)
    with pytest.raises(UsageError, match=r"engine_options\.gpu_memory_utilization: 5\.0: Input should"):
        engine.load(checkpoint)
    engine.close()


def test_several_workers_are_processes_of_their_own() -> None:
    # In one process vLLM would wait for the second worker for ever.
    engine = vllm_engine.VllmEngine({"tensor_parallel_size": 2}, MAX_LENGTH)
    assert engine._settings["distributed_executor_backend"] == "mp"
    assert vllm_engine.VllmEngine({}, MAX_LENGTH)._settings["distributed_executor_backend"] == "uni"


def test_a_missing_or_unfit_vllm_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vllm_settings, "version", missing)
    with pytest.raises(
        UsageError, match=r"vllm is not installed; pip install 'grpo-stages\[vllm\]' on a machine"
    ):
        vllm_settings.check_version()
    monkeypatch.setattr(vllm_settings, "version", lambda name: "0.31.2")
    with pytest.raises(UsageError, match=r"vllm 0.31.2 is installed, 0.32 to 0.33 is right; pip install"):
        vllm_settings.check_version()
    monkeypatch.setattr(vllm_settings, "version", lambda name: "0.33.1+cu130")
    vllm_settings.check_version()


PIPELINE = """\
run: v
iterations: 2
model: ./model
prompts: {{source: prompts.jsonl}}
generate:
  engine: vllm
  prompts_per_iteration: 6
  samples_per_prompt: 2
  max_new_tokens: {max_new_tokens}
  rollouts_per_shard: 4
  engine_options: {options}
score: {{workers: 1, rewards: [{{function: "reward:code"}}]}}
update: {{learning_rate: 0.01}}
"""


def write_project(folder: Path, checkpoint: Path, max_new_tokens: int, options: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "model").mkdir()
    for path in checkpoint.iterdir():
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(6)))
    (folder / "reward.py").write_text(
        "def code(prompts, completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    text = PIPELINE.format(max_new_tokens=max_new_tokens, options=json.dumps(options))
    (folder / "pipeline.yaml").write_text(text)
    return folder


def test_a_run_with_vllm_agrees_with_its_learner(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grpo: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(write_project(tmp_path / "p", checkpoint, 8, {}))
    code, _, err = grpo("run")
    assert code == 0, err
    assert "engine: vllm on cpu (as configured)" in err
    code, out, err = grpo(
        "sql", "select mismatch_mean, ratio_max, ratio_mean, learning_rate from updates", "--json"
    )
    assert code == 0, err
    rows = json.loads(out)
    assert len(rows) == 2
    for row in rows:
        assert row["mismatch_mean"] < 1e-4
        assert abs(row["ratio_max"] - 1) < 1e-3
    # The same, stage by stage: another process would open its own engine and get the same bytes.
    whole = ids(Path("artifacts/v"))
    Path("artifacts/v").rename("artifacts/whole")
    for iteration in range(2):
        for stage in ("generate", "score", "advantage", "update"):
            code, _, err = grpo(stage, "--iteration", str(iteration))
            assert code == 0, err
    assert ids(Path("artifacts/v")) == whole


def ids(run: Path) -> dict[str, dict[str, str]]:
    """Of what each stage made; which policies are on disk depends on when a command ended."""
    paths = [
        path for path in sorted(run.glob("iteration=*/*/manifest.json")) if path.parent.name != CHECKPOINT
    ]
    return {str(path.relative_to(run)): json.loads(path.read_text())["ids"] for path in paths}


@pytest.mark.slow
def test_a_worker_killed_in_mid_shard_exits_8_and_the_rest_is_resumed(
    checkpoint: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    # A worker process of vLLM's own, and two sequences at a time: shards are committed one after another.
    tally = new_tally("the engine dies in mid-shard", "a worker of vLLM, killed")
    options = {"distributed_executor_backend": "mp", "max_num_seqs": 2}
    project = write_project(tmp_path / "p", checkpoint, 200, options)
    (project / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    process = start_grpo(project, "generate")
    wait_for(lambda: sidecars(project), process)
    os.kill(worker_of(process.pid), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 8, err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: generate: vLLM failed while sampling: VllmWorker-0 died (exit code -9); ")
    assert "what is committed is kept" in line
    kept = {path.name: path.stat().st_ino for path in parquets(project)}
    assert 0 < len(sidecars(project)) < 3
    resumed = start_grpo(project, "generate")
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    files = list((project / "artifacts/v/iteration=000000/rollouts").glob("*.parquet"))
    assert len(files) == 3
    committed = {path.name: path.stat().st_ino for path in files}
    assert kept.items() <= committed.items()  # the very same files
    query = "select count(*) as n, count(distinct (group_id, sample_id)) as keys from rollouts"
    done = subprocess.run(
        [*GRPO, "sql", query, "--json"], cwd=project, capture_output=True, text=True, check=True
    )
    with tally.trial():
        assert json.loads(done.stdout) == [{"n": 12, "keys": 12}]


GRPO = [sys.executable, "-c", "if __name__ == '__main__': from grpo.cli import main; main()"]


def start_grpo(project: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*GRPO, *arguments], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def sidecars(project: Path) -> list[Path]:
    return list(project.glob("artifacts/v/.staging/iteration=000000/rollouts-*/*.sidecar.json"))


def parquets(project: Path) -> list[Path]:
    return [path.with_name(path.name.removesuffix(".sidecar.json")) for path in sidecars(project)]


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]", limit_s: float = 300) -> None:
    ends = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < ends
        time.sleep(0.002)


def worker_of(pid: int) -> int:
    """The child that vLLM named its worker."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and (path / "cmdline").read_bytes().startswith(b"VLLM::Worker"):
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError("no worker of vLLM is there")
