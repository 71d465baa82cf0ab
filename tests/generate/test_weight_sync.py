"""The real engine, wrapped so that it fails as engines do: weights that stay behind a reload."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from transformers import Qwen2ForCausalLM

from grpo.errors import EngineError
from grpo.generate import weight_sync as room
from grpo.generate.engines import transformers_engine as engine_room
from grpo.generate.engines.protocol import Engine, Group, OnProgress, Request, Sampling
from grpo.generate.engines.transformers_engine import TransformersEngine
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import WeightCheck, check_sequences, measure
from grpo.models.weights import Weights

SEQUENCES = check_sequences([list(b"3+4=7;"), list(b"What is 12 - 5? 7.")], None)
LARGE, SMALL = 1e-2, 5e-7  # of one optimiser step: AdamW's first moves every weight by the learning rate


def write_policy(folder: Path, tied: bool) -> Path:
    config = tiny.qwen2(initializer_range=0.2, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def stepped(policy: Path, folder: Path, size: float, seed: int = 0) -> Path:
    """The policy after a step: every weight `size` up or down."""
    shutil.copytree(policy, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        weights[name] = tensor + size * sign
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(policy: Path) -> WeightCheck:
    return measure(Reader(load_model(policy, "cpu")), SEQUENCES)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("start") / "model", tied=True)


@pytest.fixture(scope="module")
def later(start: Path) -> Path:
    """The policy after one large step."""
    return stepped(start, start.parent / "later", LARGE)


@pytest.fixture(scope="module")
def nudged(start: Path) -> Path:
    """The policy after one small step."""
    return stepped(start, start.parent / "nudged", SMALL)


Source = Path | Weights
Load = Callable[[TransformersEngine, Source, int], None]  # (engine, what is brought, which time, from 1)


class Faulty:
    """The real engine; `load` is called in place of its load and take, `shift` is added to its scores."""

    device = "cpu"

    def __init__(self, load: Load, precision: str) -> None:
        self.engine = TransformersEngine("cpu", max_rows_per_batch=64)
        self.precision, self.tail = precision, self.engine.tail
        self.shift = 0.0
        self.num_loads = 0
        self._load = load

    def load(self, checkpoint: Path) -> None:
        self.num_loads += 1
        self._load(self.engine, checkpoint, self.num_loads)

    def take(self, weights: Weights) -> None:
        """Of a copy: what stays behind must not follow because it is the learner's own tensors."""
        self.num_loads += 1
        self._load(self.engine, Weights(copy.deepcopy(weights.model), weights.folder), self.num_loads)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [logprobs + np.float32(self.shift) for logprobs in self.engine.logprobs(sequences)]

    def sample(
        self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
    ) -> Iterator[Group]:
        return self.engine.sample(shards, sampling, on_progress)

    def release(self) -> None:
        self.engine.release()

    def close(self) -> None:
        self.engine.close()


def right(engine: TransformersEngine, source: Source, number: int) -> None:
    if isinstance(source, Weights):
        engine.take(source)
    else:
        engine.load(source)


def stale_after(num_loads: int, load: Load = right) -> Load:
    """A load that from then on reports success and does nothing."""

    def stale(engine: TransformersEngine, source: Source, number: int) -> None:
        if number <= num_loads:
            load(engine, source, number)

    return stale


def stale_head_after(num_loads: int) -> Load:
    """A load that from then on brings everything but the output head, as vLLM 0.24's does on a CPU."""

    def stale(engine: TransformersEngine, source: Source, number: int) -> None:
        head = None if engine._model is None else engine._model.lm_head
        right(engine, source, number)
        if number > num_loads:
            assert engine._model is not None
            engine._model.lm_head = head  # where it is tied, no longer the embeddings' weights

    return stale


def rounded(engine: TransformersEngine, source: Source, number: int) -> None:
    """Weights in bfloat16, computed with in float32."""
    right(engine, source, number)
    assert engine._model is not None
    for parameter in engine._model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def weight_sync(load: Load = right, precision: str = "float32") -> tuple[WeightSync, Faulty]:
    engine = Faulty(load, precision)
    as_engine: Engine = engine
    return WeightSync(as_engine, lambda _: None), engine


def opened(start: Path, load: Load = right, precision: str = "float32") -> tuple[WeightSync, Faulty]:
    """Opened, and holding the starting policy, as an iteration 0 leaves it: after three loads."""
    given, engine = weight_sync(load, precision)
    given.open(start, check(start))
    given.bring("p0", start, check(start))
    return given, engine


def too_far(what: str, precision: str = "float32", tolerance: str = "1.0e-04") -> str:
    """A pattern for the whole message."""
    return (
        rf"^generate: the engine does not compute {what} as the learner does: (nan|\d\.\de[+-]\d\d) nats per"
        rf" token apart, at most {re.escape(tolerance)} is right in {precision}; its weights are stale or it"
        r" is not the same model; nothing was sampled$"
    )


def very_logprobs(policy: object) -> str:
    return (
        f"generate: the engine gives {policy} the very log-probs of the policy before: its weights are"
        " stale; nothing was sampled"
    )


# An engine that is right


@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_that_takes_every_policy_is_within_1e_5(tmp_path: Path, tied: bool) -> None:
    start = write_policy(tmp_path / "p0", tied)
    given, engine = opened(start)
    policy = start
    for number, size in enumerate([LARGE, 1e-4, 1e-5, SMALL], 1):
        policy = stepped(policy, tmp_path / f"p{number}", size)
        difference = given.bring(f"p{number}", policy, check(policy))
        assert difference is not None
        assert 0 <= difference <= 1e-5
    # The starting policy, its perturbed copy, the starting policy again, and four others.
    assert engine.num_loads == 3 + 4


def test_the_policy_that_is_held_is_not_loaded_again(start: Path, later: Path) -> None:
    given, engine = opened(start)
    assert given.bring("p0", start, check(start)) is None
    assert engine.num_loads == 3
    assert given.bring("p1", later, check(later)) is not None
    assert given.bring("p1", later, check(later)) is None
    assert engine.num_loads == 4


def test_after_release_the_same_policy_is_loaded_again_and_may_score_as_before(start: Path) -> None:
    # As after an update that was skipped: the id is the same, so are all log-probs, and that is right.
    given, engine = opened(start)
    given.release()
    assert engine.engine._model is None
    difference = given.bring("p0", start, check(start))
    assert difference is not None
    assert difference <= 1e-5
    assert engine.num_loads == 4


def test_a_policy_may_come_back(start: Path, later: Path) -> None:
    given, _ = opened(start)
    for name, policy in (("p1", later), ("p0", start), ("p1", later)):
        assert given.bring(name, policy, check(policy)) is not None


def test_small_steps_pass_in_an_engine_that_rounds(start: Path, tmp_path: Path) -> None:
    said: list[str] = []
    engine = Faulty(rounded, "bfloat16")
    given = WeightSync(engine, said.append)
    given.open(start, check(start))
    assert len(said) == 1
    pattern = (
        r"engine: bfloat16, (\d\.\de-0\d) nats per token from the learner's float32 on the starting policy"
    )
    found = re.fullmatch(pattern, said[0])
    assert found
    assert 1e-3 < float(found[1]) < 0.1
    given.bring("p0", start, check(start))
    policy = start
    for number in range(1, 4):
        policy = stepped(policy, tmp_path / f"p{number}", SMALL, seed=number)
        difference = given.bring(f"p{number}", policy, check(policy))
        assert difference is not None
        assert difference > 1e-4  # no float32 tolerance would have let it pass


def test_float32_says_nothing(start: Path) -> None:
    said: list[str] = []
    WeightSync(Faulty(right, "float32"), said.append).open(start, check(start))
    assert said == []


# An engine that is stale


@pytest.mark.parametrize("load", [right, rounded])
def test_a_load_that_only_works_once_is_found_when_the_engine_opens(start: Path, load: Load) -> None:
    precision = "float32" if load is right else "bfloat16"
    given, _ = weight_sync(stale_after(1, load), precision)
    with pytest.raises(EngineError, match="the engine does not compute a perturbed copy as the") as caught:
        given.open(start, check(start))
    assert caught.value.exit_code == 8
    if load is right:
        assert re.fullmatch(too_far("a perturbed copy"), str(caught.value))


@pytest.mark.parametrize("load", [right, stale_after(1)])
def test_an_engine_too_far_from_the_learner_to_tell_stale_weights_is_refused(start: Path, load: Load) -> None:
    """The tolerance is 3 x the disagreement: at a shift of 0.5 it would hold what did not move at all."""
    given, engine = weight_sync(load, "bfloat16")
    engine.shift = 0.5
    pattern = (
        r"generate: the engine is 5\.0e-01 nats per token from the learner on the starting policy, and a"
        r" change of every weight by 10% moves it by \d\.\de[+-]\d\d: too far apart to tell stale weights; .*"
    )
    with pytest.raises(EngineError, match=pattern):
        given.open(start, check(start))


def test_a_load_that_only_works_twice_is_found_before_iteration_0_is_sampled(start: Path) -> None:
    given, _ = weight_sync(stale_after(2))
    given.open(start, check(start))
    with pytest.raises(EngineError, match=too_far("the policy")):  # it still has the perturbed copy
        given.bring("p0", start, check(start))


def test_a_load_that_stops_working_later_is_found(start: Path, later: Path) -> None:
    given, _ = opened(start, stale_after(3))
    with pytest.raises(EngineError, match=too_far("the policy")) as caught:
        given.bring("p1", later, check(later))
    assert caught.value.exit_code == 8


@pytest.mark.parametrize(("load", "precision"), [(right, "float32"), (rounded, "bfloat16")])
def test_a_small_step_that_hides_under_the_tolerance_is_found_by_its_bits(
    start: Path, nudged: Path, load: Load, precision: str
) -> None:
    # A step of 5e-7 moves a log-prob by 1.4e-5 on average.
    assert check(nudged).difference([np.array(row) for row in check(start).logprobs]) < 3e-5
    given, _ = opened(start, stale_after(3, load), precision)
    with pytest.raises(EngineError) as caught:
        given.bring("p1", nudged, check(nudged))
    assert (str(caught.value), caught.value.exit_code) == (very_logprobs(nudged), 8)


def test_the_bits_of_the_policy_before_are_remembered_over_a_release(start: Path, nudged: Path) -> None:
    held = load_model(start, "cpu")

    def back_to_the_start(engine: TransformersEngine, source: Source, number: int) -> None:
        right(engine, source, number)
        if number > 3:
            engine._model = held

    given, _ = opened(start, back_to_the_start)
    given.release()
    with pytest.raises(EngineError) as caught:
        given.bring("p1", nudged, check(nudged))
    assert str(caught.value) == very_logprobs(nudged)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_head_that_stays_behind_is_found_when_the_engine_opens(tmp_path: Path, tied: bool) -> None:
    start = write_policy(tmp_path / "p0", tied)
    given, _ = weight_sync(stale_head_after(1))
    with pytest.raises(EngineError, match=too_far("a perturbed copy")):
        given.open(start, check(start))


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_head_that_stays_behind_later_is_found(tmp_path: Path, tied: bool) -> None:
    start = write_policy(tmp_path / "p0", tied)
    later = stepped(start, tmp_path / "p1", LARGE)
    given, _ = opened(start, stale_head_after(3))
    with pytest.raises(EngineError, match=too_far("the policy")):
        given.bring("p1", later, check(later))


def test_a_head_that_stays_behind_small_steps_is_found_once_they_add_up(tmp_path: Path) -> None:
    # Everything else is loaded, so that no two policies score alike, and one step is under the tolerance.
    policy = write_policy(tmp_path / "p0", tied=True)
    given, _ = opened(policy, stale_head_after(3))
    policies = [policy]
    for number in range(1, 10):
        policies.append(stepped(policies[-1], tmp_path / f"p{number}", 2e-5))  # all in one direction
    difference = given.bring("p1", policies[1], check(policies[1]))
    assert difference is not None
    assert difference > 1e-5  # more than an engine that is right
    with pytest.raises(EngineError, match=too_far("the policy")):
        given.bring("p9", policies[9], check(policies[9]))


def test_what_failed_is_loaded_and_checked_again(start: Path, later: Path) -> None:
    given, engine = opened(start)
    engine.shift = 1.0
    with pytest.raises(EngineError):
        given.bring("p1", later, check(later))
    with pytest.raises(EngineError):
        given.bring("p1", later, check(later))
    engine.shift = 0.0
    assert given.bring("p1", later, check(later)) is not None
    assert engine.num_loads == 3 + 3


# In memory


def in_memory(policy: Path) -> Weights:
    return Weights(load_model(policy, "cpu"), policy)


def without(name: str) -> Load:
    """Brings everything but one weight, which stays as it was before."""

    def lacking(engine: TransformersEngine, source: Source, number: int) -> None:
        before = None if engine._model is None else engine._model.get_parameter(name).detach().clone()
        right(engine, source, number)
        if before is not None:
            assert engine._model is not None
            engine._model.get_parameter(name).data = before

    return lacking


def late(load: Load) -> Load:
    """As it should be until the engine is open and has the starting policy."""
    return lambda engine, source, number: (right if number <= 3 else load)(engine, source, number)


@pytest.mark.parametrize("source", [in_memory, Path])
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(stale_after(3), id="stale by one update"),
        pytest.param(stale_head_after(3), id="a stale head, tied"),
        pytest.param(late(without("model.layers.0.mlp.up_proj.weight")), id="one layer not sent"),
    ],
)
def test_what_did_not_arrive_is_found(
    start: Path, later: Path, fault: Load, source: Callable[[Path], Source]
) -> None:
    given, _ = opened(start)
    assert given.bring("p1", source(later), check(later)) is not None
    given, _ = opened(start, fault)
    with pytest.raises(EngineError, match=too_far("the policy")):
        given.bring("p1", source(later), check(later))


def test_one_layer_that_is_not_sent_is_found_when_the_engine_opens(start: Path) -> None:
    given, _ = weight_sync(without("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(EngineError, match=too_far("a perturbed copy")):
        given.open(start, check(start))


def test_bits_that_did_not_move_are_found_in_memory_too(start: Path, nudged: Path) -> None:
    given, _ = opened(start, stale_after(3))
    with pytest.raises(EngineError) as caught:
        given.bring("p1", in_memory(nudged), check(nudged))
    assert str(caught.value) == very_logprobs("the learner's policy")


def test_opening_loads_the_model_once(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    for module in (room, engine_room):

        def noting(checkpoint: Path, *arguments: Any) -> Any:
            loaded.append(checkpoint)
            return load_model(checkpoint, *arguments)

        monkeypatch.setattr(module, "load_model", noting)
    engine = TransformersEngine("cpu", max_rows_per_batch=64)
    given, right_check = WeightSync(engine, print), check(start)
    before = sorted(start.parent.rglob("*"))
    given.open(start, right_check)
    assert loaded == [start]
    assert sorted(start.parent.rglob("*")) == before  # and writes nothing
    given.bring("p0", start, right_check)
    assert loaded == [start]  # the modules are there: only weights are read


# What is close enough


@pytest.mark.parametrize(
    ("precision", "fresh", "passes", "fails", "tolerance"),
    [
        ("float32", 0.0, 9e-5, 1.1e-4, "1.0e-04"),
        ("float32", 9e-5, 9e-5, 1.1e-4, "1.0e-04"),  # fixed, whatever it was on the starting policy
        ("bfloat16", 0.01, 0.029, 0.031, "3.0e-02"),  # 3 x 0.01
        ("fp8", 0.02, -0.059, -0.061, "6.0e-02"),  # 3 x 0.02, either way
        ("bfloat16", 1e-5, 9e-5, 1.1e-4, "1.0e-04"),  # 3 x 1e-5 is less than what float32 may do
    ],
)
def test_the_tolerance(
    start: Path, later: Path, precision: str, fresh: float, passes: float, fails: float, tolerance: str
) -> None:
    given, engine = weight_sync(precision=precision)
    engine.shift = fresh
    given.open(start, check(start))
    engine.shift = passes
    difference = given.bring("p1", later, check(later))
    assert difference is not None
    assert abs(difference - abs(passes)) < 1e-5
    given.release()
    engine.shift = fails
    with pytest.raises(EngineError, match=too_far("the policy", precision, tolerance)) as caught:
        given.bring("p1", later, check(later))
    assert f" {abs(fails):.1e} nats per token apart," in str(caught.value)


def test_float32_that_is_not_the_learner_s_model_is_refused_at_once(start: Path) -> None:
    given, engine = weight_sync()
    engine.shift = 2e-4
    with pytest.raises(EngineError, match=too_far("the starting policy")):
        given.open(start, check(start))
    assert engine.num_loads == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_that_are_no_numbers_are_an_error(start: Path, later: Path, precision: str) -> None:
    given, engine = weight_sync(precision=precision)
    engine.shift = float("nan")
    with pytest.raises(EngineError, match=too_far("the starting policy", precision)):
        given.open(start, check(start))
    given, engine = opened(start, precision=precision)
    engine.shift = float("nan")
    with pytest.raises(EngineError, match=too_far("the policy", precision)):
        given.bring("p1", later, check(later))


def test_a_weight_check_of_another_policy_is_refused(start: Path, later: Path) -> None:
    given, _ = opened(start)
    with pytest.raises(EngineError, match=too_far("the policy")):
        given.bring("p1", later, replace(check(later), logprobs=check(start).logprobs))
