# transformers' models and configurations are not typed well enough for:
# mypy: disable-error-code="no-untyped-call"
"""The real stage and the real engine on a tiny random Qwen2 whose token id is a byte."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests import tiny
from tests.conftest import NewTally
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from grpo import tables
from grpo.artifacts import ActiveRun, Manifest, Plan, Product, Run, Staging, choose_attempt
from grpo.artifacts.checkpoint import checkpoint_id
from grpo.config import Config
from grpo.console import Console
from grpo.errors import DataError, InputError, Interrupted, UsageError
from grpo.generate import stage
from grpo.generate.engines.protocol import Engine, Group, OnProgress, Request, Sample, Sampling, group_seed
from grpo.generate.plan import plan as planned
from grpo.models import starter_model
from grpo.models.weights import Weights
from grpo.pipeline import prepare
from grpo.pipeline.resources import Resources
from grpo.pipeline.stages import GENERATE, make
from grpo.prompts.table import draw

EOS_IDS = [
    starter_model.build_tokenizer().eos_token_id,
    *range(0, 250, 8),
]  # many, so that some responses end early
VOCABULARY = 258
PROMPTS = ["3+4=", "What is 12 - 5?", "a", "Name a prime number."]
K, GROUPS, MAX_NEW_TOKENS, TEMPERATURE, SEED = 3, 6, 8, 0.8, 5
SHARDS = [[0, 2], [2, 4], [4, 6]]  # 7 rollouts a shard: two whole groups of 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen2") / "model")


def write_checkpoint(path: Path) -> Path:
    torch.manual_seed(0)
    config = tiny.qwen2(
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.02,
        eos_token_id=EOS_IDS[0],
        pad_token_id=EOS_IDS[0],
    )
    model: Any = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # far from uniform
    model.generation_config.eos_token_id = EOS_IDS
    model.save_pretrained(path)
    starter_model.build_tokenizer().save_pretrained(path)
    return path


def opened(
    folder: Path, checkpoint: Path, rows: Sequence[Any] | None = None, prompts: Any = None, **generate: Any
) -> ActiveRun:
    """A run that is prepared: its prompts and its starting policy are committed."""
    rows = rows or [{"prompt": text} for text in PROMPTS]
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {
        "prompts_per_iteration": GROUPS,
        "samples_per_prompt": K,
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": TEMPERATURE,
        "rollouts_per_shard": 7,
    }
    config = {
        "run": "r",
        "seed": SEED,
        "model": str(checkpoint),
        "prompts": {"source": "p.jsonl", **(prompts or {})},
        "generate": sizes | generate,
        "score": {"rewards": [{"function": "exact_answer"}]},
    }
    run = ActiveRun(folder / "artifacts", Config.model_validate(config), folder, Console(quiet=True))
    prepare.prepare(run)
    return run


Wrap = Callable[[Engine], Engine]


def generated(run: ActiveRun, wrap: Wrap | None = None, iteration: int = 0) -> Manifest:
    """One iteration, from where it was left."""
    plan = planned(run, iteration)
    attempt = choose_attempt(run, plan, run.manifest("rollouts", iteration), force=False)
    with stage.open_resource(run, Resources(run).lend) as tool:
        if wrap is not None:
            tool.engine = tool.weight_sync.engine = wrap(tool.engine)
        return make(run, GENERATE, Staging(run, plan, attempt), tool)


def output(run: Run) -> dict[str, bytes]:
    """Every file of the committed output by name, but for the times."""
    folder = run.folder("rollouts", 0)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timings.json"}


def staged(run: Run) -> list[str]:
    """Shards that are committed in the staging folder, by their number."""
    found = run.staging_root(0).glob("rollouts-*/*.sidecar.json")
    return sorted(path.name.split("-")[1] for path in found)


class Watched:
    """The real engine, noting what it is asked for; `spoil` may change a group or raise."""

    def __init__(self, engine: Engine, spoil: Callable[[int, Group], Group]) -> None:
        self.engine = engine
        self.spoil = spoil
        self.precision, self.device, self.tail = engine.precision, engine.device, engine.tail
        self.asked: list[int] = []
        self.num_loads = 0

    def load(self, checkpoint: Path) -> None:
        self.num_loads += 1
        self.engine.load(checkpoint)

    def take(self, weights: Weights) -> None:
        self.num_loads += 1
        self.engine.take(weights)

    def sample(
        self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
    ) -> Iterator[Group]:
        self.asked = [request.group_id for shard in shards for request in shard]
        for number, group in enumerate(self.engine.sample(shards, sampling, on_progress)):
            yield self.spoil(number, group)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self.engine.logprobs(sequences)

    def release(self) -> None:
        self.engine.release()

    def close(self) -> None:
        self.engine.close()


class Broken(Exception):
    """What an engine that dies raises."""


def dies_at(n: int) -> Wrap:
    """An engine that raises where it should give its group number n (from 0)."""

    def spoil(number: int, group: Group) -> Group:
        if number == n:
            raise Broken
        return group

    return lambda engine: Watched(engine, spoil)


def watched(into: list[Watched]) -> Wrap:
    """An engine that spoils nothing and is put into the list."""

    def wrap(engine: Engine) -> Engine:
        into.append(Watched(engine, lambda _, group: group))
        return into[-1]

    return wrap


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose iteration 0 was sampled in one go; read it only."""
    run = opened(tmp_path_factory.mktemp("undisturbed"), checkpoint)
    generated(run)
    return run


@pytest.fixture(scope="module")
def rollouts(undisturbed: Run) -> pa.Table:
    return undisturbed.read("rollouts", 0)


# ---- the table ----


def test_every_column_of_the_contract_is_there_with_its_type(rollouts: pa.Table) -> None:
    assert rollouts.schema.equals(tables.schema("rollouts"))
    assert rollouts.column_names == [
        *("iteration", "group_id", "sample_id", "prompt_id", "round", "prompt", "response"),
        *("prompt_token_ids", "response_token_ids", "old_logprobs", "response_mask", "finish_reason"),
        *("response_tokens", "policy_iteration", "temperature", "seed"),
    ]
    assert all(column.null_count == 0 for column in rollouts.columns)


def test_every_group_has_its_k_samples_in_key_order(rollouts: pa.Table) -> None:
    keys = list(zip(*(rollouts[name].to_pylist() for name in tables.KEY), strict=True))
    assert keys == [(0, group, sample) for group in range(GROUPS) for sample in range(K)]


def test_a_group_is_the_prompt_that_was_drawn(rollouts: pa.Table) -> None:
    drawn = draw(len(PROMPTS), SEED, 0, GROUPS).tolist()
    assert len(set(drawn[:4])) == 4  # six draws of four prompts: two are drawn twice
    for row in rollouts.to_pylist():
        assert row["prompt_id"] == drawn[row["group_id"]]
        assert row["prompt"] == PROMPTS[row["prompt_id"]]
        assert row["prompt_token_ids"] == list(row["prompt"].encode())  # a token is a byte


def test_the_columns_of_a_rollout_agree(rollouts: pa.Table) -> None:
    reasons = set()
    for row in rollouts.to_pylist():
        token_ids = row["response_token_ids"]
        assert 1 <= row["response_tokens"] == len(token_ids) == len(row["old_logprobs"]) <= MAX_NEW_TOKENS
        assert row["response_mask"] == [True] * len(token_ids)
        # Bytes as text; 256 and 257 are special and no text; bytes that are no UTF-8 are replaced.
        assert row["response"] == bytes(t for t in token_ids if t < 256).decode(errors="replace")
        ends = [token in EOS_IDS for token in token_ids]
        assert not any(ends[:-1])
        assert row["finish_reason"] == ("stop" if ends[-1] else "length")
        assert ends[-1] or len(token_ids) == MAX_NEW_TOKENS
        assert (row["round"], row["policy_iteration"], row["temperature"]) == (0, 0, TEMPERATURE)
        reasons.add(row["finish_reason"])
    assert reasons == {"stop", "length"}  # else half of the above proves nothing


def test_the_seed_of_sample_s_is_the_group_s_plus_s(rollouts: pa.Table) -> None:
    for row in rollouts.to_pylist():
        assert row["seed"] == group_seed(SEED, 0, row["group_id"]) + row["sample_id"]
    assert len(set(rollouts["seed"].to_pylist())) == GROUPS * K


def test_old_logprobs_are_those_of_a_plain_forward_pass(rollouts: pa.Table, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for row in rollouts.to_pylist():
        prompt, response = row["prompt_token_ids"], row["response_token_ids"]
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs_TV = torch.log_softmax(logits_TV / row["temperature"], dim=-1)
        plain_T = logprobs_TV[torch.arange(len(response)), torch.tensor(response)].numpy()
        assert np.abs(np.array(row["old_logprobs"]) - plain_T).max() <= 1e-5
        assert max(row["old_logprobs"]) <= 0


def test_chat_prompts_go_through_the_template(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "3+4="}, {"messages": [{"role": "user", "content": "a"}]}]
    prompts = {"chat": True, "system": "Add."}
    run = opened(tmp_path, checkpoint, rows, prompts, prompts_per_iteration=2)
    generated(run)
    shown = {row["prompt_id"]: row for row in run.read("rollouts", 0).to_pylist()}
    assert shown[0]["prompt"] == "system: Add.\nuser: 3+4=\nassistant: "
    assert shown[1]["prompt"] == "system: Add.\nuser: a\nassistant: "
    assert shown[0]["prompt_token_ids"] == list(b"system: Add.\nuser: 3+4=\nassistant: ")


def test_another_iteration_has_other_seeds_and_draws(
    checkpoint: Path, undisturbed: Run, tmp_path: Path
) -> None:
    # Iteration 1 samples from policy 1. A stand-in for its update commits the starting policy again.
    run = opened(tmp_path, checkpoint)
    staging = Staging(run, Plan("update", 1, "update", 0, {}, {}), 0)
    record = staging.write_bytes("", "weight_check.json", run.weight_check_path(0).read_bytes())
    staging.commit(Product({"policy": "p1"}, [record], {"moved": True}))
    staging = Staging(run, Plan("checkpoint", 1, "checkpoint", 0, {}, {"policy@1": "p1"}), 0)
    files = [staging.write_bytes("policy", path.name, path.read_bytes()) for path in checkpoint.iterdir()]
    staging.commit(Product({}, files, {}))
    manifest = generated(run, iteration=1)
    later = run.read("rollouts", 1)
    assert manifest.iteration == 1
    assert set(later["iteration"].to_pylist()) == set(later["policy_iteration"].to_pylist()) == {1}
    assert later["prompt_id"].to_pylist()[::K] == draw(len(PROMPTS), SEED, 1, GROUPS).tolist()
    assert not set(later["seed"].to_pylist()) & set(undisturbed.read("rollouts", 0)["seed"].to_pylist())


# ---- manifest ----


def test_the_manifest_counts_what_is_there(undisturbed: Run, rollouts: pa.Table) -> None:
    manifest = undisturbed.manifest("rollouts", 0)
    assert manifest is not None
    assert (manifest.stage, manifest.iteration, manifest.attempt) == ("generate", 0, 0)
    assert manifest.rows == GROUPS * K
    lengths, reasons = rollouts["response_tokens"].to_pylist(), rollouts["finish_reason"].to_pylist()
    assert manifest.summary == {
        "rollouts": 18,
        "response_tokens": sum(lengths),
        "mean_response_tokens": sum(lengths) / 18,
        "truncated_fraction": reasons.count("length") / 18,
        "policy_lag": 0,
        "rounds": 1,
        "precision": "float32",
        "weight_check_difference": manifest.summary["weight_check_difference"],
    }
    assert 0 <= manifest.summary["weight_check_difference"] <= 1e-5  # nats per token
    assert manifest.inputs == {
        "prompts": undisturbed.id_of("prompts"),
        "policy@0": undisturbed.id_of("policy@0"),
    }
    assert [file.rows for file in manifest.files] == [6, 6, 6]


@pytest.mark.parametrize(
    ("rollouts_per_shard", "shards"),
    [
        (7, SHARDS),
        (6, SHARDS),
        (1, [[group, group + 1] for group in range(6)]),  # a group is never cut
        (12, [[0, 4], [4, 6]]),
        (1000, [[0, 6]]),
    ],
)
def test_shards_are_whole_groups(
    checkpoint: Path, tmp_path: Path, rollouts_per_shard: int, shards: list[list[int]]
) -> None:
    run = opened(tmp_path, checkpoint, rollouts_per_shard=rollouts_per_shard)
    assert planned(run, 0).shards == shards


@pytest.mark.parametrize("rollouts_per_shard", [1, 1000])
def test_another_shard_plan_gives_the_same_tokens(
    checkpoint: Path, rollouts: pa.Table, tmp_path: Path, rollouts_per_shard: int
) -> None:
    run = opened(tmp_path, checkpoint, rollouts_per_shard=rollouts_per_shard)
    generated(run)
    other = run.read("rollouts", 0)
    assert other.drop_columns("old_logprobs").equals(rollouts.drop_columns("old_logprobs"))
    gaps = [
        np.abs(np.array(a) - np.array(b)).max()
        for a, b in zip(other["old_logprobs"].to_pylist(), rollouts["old_logprobs"].to_pylist(), strict=True)
    ]
    assert max(gaps) <= 1e-5  # other batches round otherwise


# ---- stopped and resumed ----


def test_again_gives_the_same_bytes(checkpoint: Path, undisturbed: Run, tmp_path: Path) -> None:
    run = opened(tmp_path, checkpoint)
    generated(run)
    assert output(run) == output(undisturbed)


@pytest.mark.parametrize(("n", "done"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_an_engine_that_dies_costs_its_shard_only(
    checkpoint: Path, undisturbed: Run, tmp_path: Path, n: int, done: int, new_tally: NewTally
) -> None:
    tally = new_tally("the engine dies in mid-shard", f"at prompt {n}")
    # Groups come two to a shard: with n of them given, n // 2 shards are complete.
    run = opened(tmp_path, checkpoint)
    with pytest.raises(Broken):
        generated(run, dies_at(n))
    assert run.manifest("rollouts", 0) is None
    assert staged(run) == ["00000", "00001", "00002"][:done]
    engines: list[Watched] = []
    generated(opened(tmp_path, checkpoint), watched(engines))
    with tally.trial():
        assert sorted(engines[0].asked) == list(range(2 * done, GROUPS))  # committed: not sampled again
        assert output(run) == output(undisturbed)
        assert not list(run.staging_root(0).iterdir())


@pytest.mark.parametrize("missing", ["sidecar", "shard and sidecar"])
def test_a_shard_that_was_not_committed_is_sampled_again(
    checkpoint: Path, undisturbed: Run, tmp_path: Path, missing: str
) -> None:
    run = opened(tmp_path, checkpoint)
    with pytest.raises(Broken):
        generated(run, dies_at(4))
    [sidecar] = run.staging_root(0).glob("rollouts-*/part-00001-*.sidecar.json")
    sidecar.unlink()
    if missing == "shard and sidecar":
        sidecar.with_name(sidecar.name.removesuffix(".sidecar.json")).unlink()
    engines: list[Watched] = []
    generated(opened(tmp_path, checkpoint), watched(engines))
    assert sorted(engines[0].asked) == [2, 3, 4, 5]
    assert output(run) == output(undisturbed)


def test_stopped_between_the_last_shard_and_the_manifest(
    checkpoint: Path, undisturbed: ActiveRun, tmp_path: Path
) -> None:
    def spoil(index: int, group: Group) -> Group:
        if index == GROUPS - 1:
            signal.raise_signal(signal.SIGINT)
        return group

    run = opened(tmp_path, checkpoint)
    with run.console.signals(), pytest.raises(Interrupted):
        generated(run, lambda engine: Watched(engine, spoil))
    assert staged(run) == ["00000", "00001", "00002"]
    engines: list[Watched] = []
    generated(opened(tmp_path, checkpoint), watched(engines))
    assert (engines[0].asked, engines[0].num_loads) == ([], 0)
    found, expected = output(run), output(undisturbed)
    manifests = [json.loads(files.pop("manifest.json")) for files in (found, expected)]
    assert found == expected
    # No engine was loaded by the process that wrote the manifest, and so none was compared.
    assert manifests[0]["summary"].pop("weight_check_difference") is None
    assert manifests[0]["summary"].pop("precision") is None
    assert manifests[1]["summary"].pop("weight_check_difference") <= 1e-5
    assert manifests[1]["summary"].pop("precision") == "float32"
    assert all(manifest.pop("sha256") for manifest in manifests)  # each is that of its own manifest
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_work_after_the_current_shard(
    checkpoint: Path, undisturbed: ActiveRun, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    def spoil(index: int, group: Group) -> Group:
        if index == 2:  # the first group of the second shard
            signal.raise_signal(number)
        return group

    run = opened(tmp_path, checkpoint)
    with run.console.signals(), pytest.raises(Interrupted) as caught:
        generated(run, lambda engine: Watched(engine, spoil))
    assert caught.value.exit_code == exit_code
    assert str(caught.value) == ("interrupted: what is committed is kept; the same command resumes from here")
    assert staged(run) == ["00000", "00001"]
    assert run.manifest("rollouts", 0) is None
    generated(opened(tmp_path, checkpoint))
    assert output(run) == output(undisturbed)


def test_the_engine_keeps_its_weights_while_the_policy_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    run = opened(tmp_path, checkpoint)
    plan = planned(run, 0)
    with stage.open_resource(run, Resources(run).lend) as tool:
        engine = Watched(tool.engine, lambda _, group: group)
        tool.engine = tool.weight_sync.engine = engine
        first = make(run, GENERATE, Staging(run, plan, 0), tool)
        # The starting policy, a perturbed copy of it, and the policy: see weight_sync.py.
        assert engine.num_loads == 3
        again = make(run, GENERATE, Staging(run, plan, 1), tool)
        assert engine.num_loads == 3
        stage.release(tool)
        after_release = make(run, GENERATE, Staging(run, plan, 2), tool)
        assert engine.num_loads == 4
    differences = [manifest.summary["weight_check_difference"] for manifest in (first, again, after_release)]
    assert 0 <= differences[0] == differences[2] <= 1e-5
    assert differences[1] is None  # nothing was loaded, and so nothing compared
    assert first.ids == again.ids == after_release.ids


# ---- what an engine may not give ----


def spoiled(change: Callable[[Sample], Sample]) -> Wrap:
    """An engine whose sample 1 of group 1, the last of the first shard, is changed."""

    def spoil(number: int, group: Group) -> Group:
        if group.group_id != 1:
            return group
        samples = list(group.samples)
        samples[1] = change(samples[1])
        return replace(group, samples=samples)

    return lambda engine: Watched(engine, spoil)


def with_logprob(value: float) -> Callable[[Sample], Sample]:
    return lambda sample: replace(sample, logprobs=np.append(sample.logprobs[:-1], np.float32(value)))


def with_token(token: int) -> Callable[[Sample], Sample]:
    return lambda sample: replace(sample, token_ids=np.append(sample.token_ids[:-1], np.int32(token)))


def cut(sample: Sample) -> Sample:
    """Three tokens and two log-probs."""
    return replace(sample, token_ids=np.array([1, 2, 3], np.int32), logprobs=np.array([-1, -2], np.float32))


KEY = "generate: rollout (iteration, group_id, sample_id) (0, 1, 1): "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_logprob(float("nan")), "a log-prob is not finite or above 0"),
        (with_logprob(float("-inf")), "a log-prob is not finite or above 0"),
        (with_logprob(float("inf")), "a log-prob is not finite or above 0"),
        (with_logprob(1e-6), "a log-prob is not finite or above 0"),
        (cut, "2 log-probs for 3 tokens"),
        (with_token(VOCABULARY), "a token id outside the vocabulary of 258"),
        (with_token(-1), "a token id outside the vocabulary of 258"),
    ],
)
def test_a_sample_that_cannot_be_trusted_is_named_and_not_committed(
    checkpoint: Path, tmp_path: Path, change: Callable[[Sample], Sample], message: str
) -> None:
    run = opened(tmp_path, checkpoint)
    with pytest.raises(DataError) as caught:
        generated(run, spoiled(change))
    assert (str(caught.value), caught.value.exit_code) == (KEY + message, 3)
    assert run.manifest("rollouts", 0) is None
    assert staged(run) == []


@pytest.mark.parametrize("num_samples", [2, 4])
def test_a_group_without_its_k_samples_is_named_and_not_committed(
    checkpoint: Path, tmp_path: Path, num_samples: int
) -> None:
    def spoil(number: int, group: Group) -> Group:
        return replace(group, samples=[*group.samples, *group.samples][:num_samples])

    run = opened(tmp_path, checkpoint)
    with pytest.raises(DataError) as caught:
        generated(run, lambda engine: Watched(engine, spoil))
    where = "generate: group (iteration, group_id) (0, 0)"
    assert str(caught.value) == f"{where}: the engine gave {num_samples} samples for 3 seeds"
    assert staged(run) == []


def test_an_empty_response_is_a_rollout(checkpoint: Path, tmp_path: Path) -> None:
    nothing = Sample(np.empty(0, np.int32), np.empty(0, np.float32), "abort")
    run = opened(tmp_path, checkpoint)
    generated(run, spoiled(lambda _: nothing))
    row = run.read("rollouts", 0).to_pylist()[1 * K + 1]
    assert (row["response"], row["response_token_ids"], row["response_tokens"]) == ("", [], 0)
    assert (row["old_logprobs"], row["response_mask"], row["finish_reason"]) == ([], [], "abort")


def test_groups_may_come_in_any_order(checkpoint: Path, undisturbed: Run, tmp_path: Path) -> None:
    class Backwards(Watched):
        def sample(
            self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
        ) -> Iterator[Group]:
            yield from reversed(list(super().sample(shards, sampling, on_progress)))

    run = opened(tmp_path, checkpoint)
    generated(run, lambda engine: Backwards(engine, lambda _, group: group))
    assert output(run) == output(undisturbed)


# ---- what a user may ask for ----


def test_without_prompts_there_is_nothing_to_plan(tmp_path: Path, checkpoint: Path) -> None:
    run = opened(tmp_path, checkpoint)
    bare = ActiveRun(tmp_path / "elsewhere", run.config, tmp_path, Console(quiet=True))
    with pytest.raises(InputError) as caught:
        planned(bare, 0)
    assert str(caught.value) == f"{tmp_path}/elsewhere/r/prompts: missing; run `grpo run` first"
    with pytest.raises(InputError) as caught:
        planned(run, 3)
    where = f"{tmp_path}/artifacts/r/iteration=000002/update"
    assert str(caught.value) == f"{where}: missing; run `grpo update --iteration 2` first"


def test_a_prompt_without_room_for_its_response(checkpoint: Path, tmp_path: Path) -> None:
    # 64 positions less 8 new tokens: 56 are left for a prompt.
    rows = [{"prompt": "a" * 56}, {"prompt": "a" * 57}]
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "error", checkpoint, rows)
    assert str(caught.value) == (
        f"{tmp_path}/error/p.jsonl:2: prompt of 57 tokens, but the context leaves room for 56 beside"
        " max_new_tokens; shorten it, or set prompts.on_long_prompt: skip"
    )
    run = opened(tmp_path / "skip", checkpoint, rows, {"on_long_prompt": "skip"}, prompts_per_iteration=1)
    manifest = run.manifest("prompts", None)
    assert manifest is not None
    assert manifest.rows == 1
    counted = {"skipped": 1, "longest_prompt_tokens": 56, "source": "p.jsonl"}
    assert manifest.summary == {**counted, "policy": checkpoint_id(checkpoint)}
    assert generated(run).rows == K


def test_more_new_tokens_than_the_context(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, checkpoint, max_new_tokens=64)
    assert str(caught.value) == (
        "generate.max_new_tokens: 64 leaves no room for a prompt in the model's context of 64 tokens"
    )
