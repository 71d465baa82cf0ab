"""Two processes of a group (gloo) against one: the same steps, each with its part of weights and work."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.models.families import VOCABULARY, write_checkpoint
from tests.update import groups
from torch import Tensor
from transformers import Qwen2ForCausalLM

from grpo.artifacts import ADAPTER, OPTIMIZER, POLICY
from grpo.config import Config, UpdateConfig
from grpo.errors import EngineError, UsageError
from grpo.update.batch import Rollouts
from grpo.update.collective import collective
from grpo.update.layout import Cost, Tree, shares_of
from grpo.update.learner import Learner
from grpo.update.objective import Stored, Sums, objective_of, step_of
from grpo.update.own_files import own_files
from grpo.update.own_surrogate import load as load_surrogate
from grpo.update.parallel import Ended, Ranks
from grpo.update.sharding import local

pytestmark = pytest.mark.xdist_group("parallel")  # the group is started once, for all tests
MAX_NEW_TOKENS, LONGEST = 9, (8, 9)
FILE_BYTES = 8192
SEED_OF = {"policy": 0, "tied": 1, "reference": 2}
SURROGATE = "def surrogate(logprobs, old_logprobs, advantages):\n    return logprobs * advantages\n"


@dataclass(frozen=True)
class Case:
    objective: str = "grpo"
    # Of responses by group. Groups are trees, and a share has some of them: here rank 1 gets the second.
    lengths: tuple[tuple[int, ...], ...] = ((3, 9, 1), (5, 2, 8, 4), (6, 6))
    update: dict[str, Any] = field(default_factory=dict)
    policy: str = "policy"


FAILURES = ("policy", "old", "surrogate", "gradient")
FAMILIES = ("gemma2", "gpt2", "qwen3_moe")  # packed; matrices the other way round; experts
CASES = {
    **{name: Case("dapo", policy=name) for name in FAMILIES},
    "grpo": Case(),
    "dapo": Case("dapo", update={"entropy_coefficient": 0.01}),
    "one rollout": Case(lengths=((7,),)),
    "tied": Case("dapo", policy="tied"),
    "scalerl": Case("scalerl", update={"off_policy_mask": 0.01, "top_entropy": 0.5}),
    "surrogate": Case("dapo", update={"surrogate": "mine:surrogate"}),
    "gradient_checkpointing": Case(update={"gradient_checkpointing": True}),
    "bfloat16": Case(update={"precision": "bfloat16"}),
    "lora": Case(update={"lora": {"rank": 4, "alpha": 8}}),
    "lora, whole head": Case(
        "dapo", update={"lora": {"rank": 4, "alpha": 8, "modules_to_save": ["lm_head"]}}
    ),
}


def settings(objective: str, **update: Any) -> UpdateConfig:
    document = {
        "run": "tiny",
        "model": "unused",
        "prompts": {"source": "unused"},
        "score": {"rewards": [{"function": "exact_answer"}]},
        "update": {
            "objective": objective,
            "learning_rate": 0.01,
            "max_tokens_per_batch": 24,
            "max_grad_norm": 0.5,
            **update,
        },
    }
    return Config.model_validate(document).update


def make_rollouts(lengths: tuple[tuple[int, ...], ...]) -> Rollouts:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(VOCABULARY, size=4 + group) for group in range(len(lengths))]
    keys = [[0, group, sample] for group, each in enumerate(lengths) for sample in range(len(each))]
    responses = [draw.integers(VOCABULARY, size=length) for each in lengths for length in each]
    return Rollouts(
        keys=np.array(keys),
        prompts=[prompts[group] for _, group, _ in keys],
        responses=responses,
        masks=[np.ones(len(response), dtype=bool) for response in responses],
        old_logprobs=[draw.normal(-5, 0.3, len(response)).astype(np.float32) for response in responses],
        advantages=draw.normal(size=len(keys)),
        temperatures=np.full(len(keys), 0.8),
    )


@collective
def gradients(learner: Learner) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    return {**found} if learner.ranks is None else learner.ranks.gather(found)


def opened(folder: Path, case: Case, ranks: Ranks | None) -> Learner:
    config = settings(case.objective, **case.update)
    learner = Learner(config, "cpu", ranks=ranks)
    learner.load(folder / case.policy, None, "start")
    if config.kl_coefficient:
        learner.load_reference(folder / "reference", is_start=config.lora is not None)
    if config.own is not None:
        learner.objective = objective_of(config, load_surrogate(folder, config.own))
    return learner


def take_step(learner: Learner, rollouts: Rollouts) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step on all rollouts; its numbers, and the log-probs that were read for it."""
    config, everything, stored = learner.config, np.arange(len(rollouts)), Stored()
    if config.kl_coefficient:
        stored.reference = learner.reference_logprobs(rollouts, everything)
    if config.top_entropy is not None:
        stored.entropy = learner.policy_entropies(rollouts, everything)[1]
    step = step_of(config, rollouts, everything, MAX_NEW_TOKENS, stored)
    row, policy = learner.step(rollouts, everything, step, stored)
    return row, {"policy": policy, "reference": stored.reference}


@collective
def save(learner: Learner, start: Path, folder: Path) -> None:
    """What a checkpoint holds, in many files; each process writes its own."""
    for part, name, content in own_files(learner, start, FILE_BYTES):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with (folder / part / name).open("xb") as file:  # nobody else's
            file.writelines([content] if isinstance(content, bytes) else content)


def load(learner: Learner, start: Path, folder: Path) -> None:
    """What save() wrote."""
    adapter = folder / ADAPTER if learner.config.lora else None
    learner.load(folder / POLICY if adapter is None else start, folder / OPTIMIZER, "saved", adapter)


@collective
def types(learner: Learner, *, exactly: bool) -> dict[str, str]:
    """Of the weights that are there while a model reads."""
    found = {}

    def note(name: str, module: Any, inputs: Any) -> None:
        found[name] = str(module.weight.dtype)

    modules = {name: each for name, each in learner.model.named_modules() if hasattr(each, "weight")}
    hooks = [each.register_forward_pre_hook(partial(note, name)) for name, each in modules.items()]
    with torch.no_grad(), learner.network.exactly() if exactly else nullcontext():
        learner.network.logprobs(learner.network._two_tokens(), exactly=exactly)
    for hook in hooks:
        hook.remove()
    return found


@collective
def shares(learner: Learner) -> dict[str, list[float]]:
    """Of all values of a model, by its name: the part that each process has."""
    found = {}
    for name, network in learner._networks.items():
        tensors = [*network.model.parameters()]
        held = sum(tensor.numel() for tensor in map(local, tensors)) / sum(t.numel() for t in tensors)
        found[name] = [held] if learner.ranks is None else learner.ranks.to_all(held)
    return found


def steps(folder: Path, name: str, ranks: Ranks | None, times: int = 1) -> dict[str, Any]:
    """Two steps of a case; the second again from a checkpoint after the first."""
    case = CASES[name]
    learner, rollouts = opened(folder, case, ranks), make_rollouts(case.lengths)
    found: dict[str, Any] = {"start": learner.digest(), "layout": learner.check_layout(rollouts, LONGEST)}
    found["shares"] = shares(learner)
    found["types"] = {exactly: types(learner, exactly=exactly) for exactly in (False, True)}
    found["row"], found["logprobs"] = take_step(learner, rollouts)
    found["gradients"] = {key: value.clone() for key, value in gradients(learner).items()}
    place = folder / f"{name}-{ranks is not None}-{times}"
    save(learner, folder / case.policy, place)
    everything = np.arange(len(rollouts))
    if ranks is None:
        found["read"] = learner.policy_logprobs(rollouts, everything)
    found["check"] = learner.measure([[1, 2, 3, 4]]).logprobs[0]
    found["row 1"], _ = take_step(learner, rollouts)
    found["end"] = learner.digest()
    found["weights"] = {key: p.detach().clone() for key, p in learner.whole()[0].named_parameters()}
    again = opened(folder, case, ranks)
    load(again, folder / case.policy, place)
    again.objective = learner.objective
    found["resumed row"], _ = take_step(again, rollouts)
    found["resumed"] = again.digest()
    if ranks is not None:
        load(again, folder / case.policy, folder / f"{name}-False-1")
        found["read"] = again.policy_logprobs(rollouts, everything)
        save(again, folder / case.policy, place.with_name(f"{place.name}-copied"))
    return found


@collective
def enlarge(learner: Learner) -> None:
    """Hidden states of 1e4 and more, under a head that makes logits of the usual size of them."""
    with torch.no_grad():
        named = dict(learner.model.named_parameters())
        named["model.norm.weight"].fill_(1e4)
        named["lm_head.weight"].mul_(1e-4)


@collective
def ruin(learner: Learner, token: int) -> None:
    """NaN in the embedding of a token."""
    weight: Any = learner.model.get_input_embeddings().weight
    with torch.no_grad():
        whole = weight if learner.ranks is None else learner.ranks.full(weight)
        broken = whole.clone()
        broken[token] = torch.nan
        weight.copy_(broken) if learner.ranks is None else learner.ranks.put(weight, broken)


def failures(folder: Path, ranks: Ranks | None) -> dict[str, str]:
    """The errors of a learner, each followed by a step that is right: the processes are still together."""
    found = {}
    for name in FAILURES:
        case = Case("grpo_sequence", update={"kl_coefficient": 0.0}) if name == "gradient" else CASES["dapo"]
        case = CASES["surrogate"] if name == "surrogate" else case
        learner, rollouts = opened(folder, case, ranks), make_rollouts(case.lengths)
        if name == "policy":
            ruin(learner, int(rollouts.responses[5][0]))
        if name == "old":
            rollouts.old_logprobs[4][1] = np.nan
        if name == "surrogate":
            rollouts.old_logprobs[4][1] = -700.0
            (folder / "bad.py").write_text(
                "def surrogate(logprobs, old_logprobs, advantages):\n"
                "    return logprobs * advantages / (old_logprobs > -600)\n"
            )
            learner.objective = objective_of(learner.config, load_surrogate(folder, "bad:surrogate"))
        if name == "gradient":  # 1e38 is a float32; times a hidden state it is none any more
            enlarge(learner)
            rollouts.advantages[5] = 1e38
        with pytest.raises(EngineError) as error:
            take_step(learner, rollouts)
        found[name] = str(error.value)
        learner = opened(folder, case, ranks)
        found[f"{name} after"] = take_step(learner, make_rollouts(case.lengths))[0]["loss"]
    return found


def driver(folder: Path, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {name: steps(folder, name, ranks) for name in CASES}
    found["again"] = steps(folder, "dapo", ranks, times=2)
    with pytest.raises(UsageError) as refused:
        opened(folder, Case(policy="gpt2", update={"precision": "bfloat16"}), ranks)
    found["refused"] = str(refused.value)
    found["failures"] = failures(folder, ranks)
    return found


def as_process(rank: int, folder: Path) -> None:
    groups.lead(rank, folder, partial(driver, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def results(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Ended]:
    """Of every case what one process found, and what rank 0 of two did; how rank 1 ended."""
    (folder / "mine.py").write_text(SURROGATE)
    for name, seed in SEED_OF.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny.qwen2(initializer_range=0.1, tie_word_embeddings=name == "tied")
            Qwen2ForCausalLM(config).save_pretrained(folder / name)
    for family in FAMILIES:
        write_checkpoint(folder / family, family)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {name: steps(folder, name, None) for name in CASES} | {"failures": failures(folder, None)}
    torch.set_num_threads(threads)
    assert groups.start(as_process, folder) == [0, 0]
    return one, *(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(groups.WORLD))


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| over the parameters; at first A of an adapter has no gradient: B is 0."""
    assert found.keys() == expected.keys()
    pairs = [(found[name] - expected[name], expected[name]) for name in expected]
    return float(max(apart.norm() / (right.norm() if right.any() else 1.0) for apart, right in pairs))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(results: Any, case: str) -> None:
    one, two = results[0][case], results[1][case]
    assert two["start"] == one["start"]  # the same weights, bit for bit
    assert two["layout"]["layout"] == one["layout"]["layout"]
    # Of a norm's weight, which is gathered in bfloat16 too, the gradient is rounded to 8 bits.
    assert deviation(two["gradients"], one["gradients"]) <= (4e-3 if case == "bfloat16" else 1e-5)
    # AdamW's first step moves each weight by the learning rate, 0.01, and rounding cannot turn it round.
    assert two["row"].keys() == one["row"].keys()
    for name, value in one["row"].items():
        close = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)
        assert two["row"][name] == close, name
    # In bfloat16 a bias of keys, whose gradient is rounding alone, may go either way.
    for name, weight in two["weights"].items() if case != "bfloat16" else ():
        assert (weight - one["weights"][name]).abs().max() <= 2e-3, name
    assert two["check"] == pytest.approx(one["check"], rel=1e-3 if case == "bfloat16" else 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_rank_0_has_what_all_have_read(results: Any, case: str) -> None:
    one, two = results[0][case]["logprobs"], results[1][case]["logprobs"]
    for name in ("policy", "reference"):
        assert two[name].keys() == one[name].keys()
        for row, logprobs in two[name].items():
            np.testing.assert_allclose(logprobs, one[name][row], atol=2e-2 if case == "bfloat16" else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_step_after_a_checkpoint_is_the_step_without_it(results: Any, case: str) -> None:
    for found in (results[0][case], results[1][case]):
        assert found["resumed row"] == found["row 1"]
        assert found["resumed"] == found["end"] != found["start"]


@pytest.mark.parametrize("case", CASES)
def test_files_do_not_know_how_many_wrote_them(folder: Path, results: Any, case: str) -> None:
    assert results
    one, two = (
        {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (folder / f"{case}-False-1", folder / f"{case}-True-1-copied")
    )
    assert len([name for name in one if name.startswith(OPTIMIZER)]) > 1
    assert ("policy/model.safetensors.index.json" in one) == (CASES[case].update.get("lora") is None)
    assert two == one


@pytest.mark.parametrize("case", CASES)
def test_weights_that_are_equal_read_alike(results: Any, case: str) -> None:
    one, two = (found[case]["read"] for found in results[:2])
    apart = np.concatenate([np.abs(two[row] - one[row]) for row in one])
    # After a step no norm's weight is one of bfloat16 any more: 2 ** -9 of it is rounded away.
    assert apart.mean() <= (5e-3 if case == "bfloat16" else 1e-6)


def test_policy_and_reference_are_shared_out(results: Any) -> None:
    assert results[0]["grpo"]["shares"] == {"policy": [1.0], "reference": [1.0]}
    two = results[1]["grpo"]["shares"]
    assert two.keys() == {"policy", "reference"}
    for held in two.values():
        assert sum(held) == pytest.approx(1.0)
        assert max(held) < 0.52


def test_layers_are_gathered_in_bfloat16_and_the_rest_is_not(results: Any) -> None:
    one, two = (found["bfloat16"]["types"] for found in results[:2])
    assert len(one[False]) == len(two[False]) == 20
    assert {*one[False].values(), *one[True].values(), *two[True].values()} == {"torch.float32"}
    for name, dtype in two[False].items():
        assert dtype == ("torch.bfloat16" if ".layers." in name else "torch.float32"), name
    assert {*results[1]["dapo"]["types"][False].values()} == {"torch.float32"}


def test_a_model_that_does_not_compute_with_bfloat16_weights_is_refused(results: Any) -> None:
    said = "update.precision: bfloat16: several processes gather weights in it, with which gpt2 does not"
    assert results[1]["refused"].startswith(said)
    assert results[1]["refused"].endswith("; set precision: float32, or start one process")


def test_two_processes_again_give_the_same_bits(results: Any) -> None:
    first, again = results[1]["dapo"], results[1]["again"]
    assert first["row 1"] == again["row 1"]
    assert first["end"] == again["end"]


def test_what_one_process_finds_wrong_all_say_as_one_would(results: Any) -> None:
    one, two, ended = results[0]["failures"], results[1]["failures"], results[2]
    for name in FAILURES:
        assert two[name] == one[name]
        assert two[f"{name} after"] == pytest.approx(one[f"{name} after"], rel=1e-5)
    # The third response of the second group has the token; the second of that group the log-prob.
    rollout = "on rollouts (iteration, group_id, sample_id)"
    assert f"update: policy_logprobs are not finite {rollout} (0, 1, 2)" in two["policy"]
    assert f"update: old_logprobs are not finite {rollout} (0, 1, 1)" in two["old"]
    assert f"bad:surrogate: returned nan or inf {rollout} (0, 1, 1)" in two["surrogate"]
    assert f"{rollout} (0, 1, 2)" in two["gradient"]
    assert two["gradient"].startswith("update: the gradient is ")
    assert ended == Ended(0)


def test_trees_are_dealt_out_by_their_cost() -> None:
    # Costs are tokens: 9 | 8, 8+5 | 9+6, ... each to the share that has the least, the first of equal ones.
    trees = [Tree((row,), size) for row, size in enumerate((9, 8, 6, 5, 2, 1))]
    shares = shares_of(trees, 2, Cost(per_token=1.0, per_position=0.0))
    # 9; 8; 8+6; 9+5; 14+2 (first of equal ones); 14+1.
    assert [[tree.num_tokens for tree in share] for share in shares] == [[9, 5, 2], [8, 6, 1]]
    # With attention that computes a square: 81, 64+36, 81+25, 100+4, 104+1.
    shares = shares_of(trees, 2, Cost(per_token=0.0, per_position=1.0))
    assert [[tree.num_tokens for tree in share] for share in shares] == [[9, 5], [8, 6, 2, 1]]
    assert shares_of(trees, 1, Cost(1.0, 0.0)) == [trees]
    assert shares_of(trees[:1], 3, Cost(1.0, 0.0)) == [trees[:1], [], []]


def test_sums_by_hand() -> None:
    # Everything is added but the largest ratio.
    first = Sums(
        policy_loss=1.0,
        tokens=3.0,
        entropy=6.0,
        ratio=2.0,
        ratios=2.0,
        clipped_low=1.0,
        clips=2.0,
        rollouts=1.0,
        largest=1.5,
    )
    second = Sums(
        policy_loss=0.5, tokens=1.0, entropy=4.0, ratio=4.0, ratios=2.0, clips=2.0, rollouts=1.0, largest=1.25
    )
    row = (first + second).row(objective_of(settings("dapo")))
    assert (row["policy_loss"], row["ratio_max"], row["kl"]) == (1.5, 1.5, None)
    assert (row["entropy"], row["ratio_mean"]) == (10 / 4, 6 / 4)
    assert (row["clip_fraction_low"], row["clip_fraction_high"]) == (1 / 4, 0)
