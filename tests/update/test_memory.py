"""What is told of memory, against what torch keeps, what peft adds, and numbers worked out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.update.examples import configuration
from transformers import PreTrainedModel

from grpo.config import Config, LoraConfig
from grpo.models.loading import load_model
from grpo.models.size import Shape, shape_of
from grpo.update.adapter import add_adapter
from grpo.update.batch import Rollouts, made_up_pair
from grpo.update.layout import plan, tree_of
from grpo.update.memory import Needs, adapter_parameters, layer_bytes, longest_batch, needs
from grpo.update.network import Network, cost_of

SHAPE = Shape(layers=2, hidden=8, intermediate=16, queries=8, keys=4, vocabulary=100, tied=True, normed=False)
NUMBERS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def model_of(family: str, layers: int) -> PreTrainedModel:
    head = {"head_dim": 16} if family == "Qwen3" else {}  # wider than a share of the hidden size
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=layers, **NUMBERS, **head)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return model


def kept(family: str, layers: int, tokens: int, precision: str) -> int:
    """Bytes that autograd keeps of a group of `tokens`, but for what are weights."""
    model = model_of(family, layers)
    network = Network(model, precision, share_prompts=True)
    assert network.layout == "shared"
    pair = made_up_pair(tokens - 17, 16, vocabulary=64)  # and a response of one token
    batch = network.batch(pair, [[tree_of(pair, [0, 1])]])
    found: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs_N, _ = network.logprobs(batch, with_entropy=True)
    assert logprobs_N.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_layer_keeps_what_is_told(family: str, precision: str) -> None:
    # Of one more layer, and of that what grows with the tokens: no weight, no head. What is left out is one
    # number of a token for each norm and each head: 5 of 848 in a Llama, 13 of 1,264 in a Qwen3.
    layer = {
        tokens: kept(family, 3, tokens, precision) - kept(family, 2, tokens, precision)
        for tokens in (64, 128)
    }
    measured = (layer[128] - layer[64]) / 64
    shape = shape_of(model_of(family, 2).config)
    assert shape is not None
    told = layer_bytes(shape, configuration(precision=precision).update)
    assert told == pytest.approx(measured, rel=0.03)


def test_a_layer_by_hand() -> None:
    # float32: 4 x (6 x 8 + 4 x 8 + 4 x 16); autocast: 26 x 8 + 8 x 8 + 8 x 16; frozen norms 8 x 8 less.
    assert layer_bytes(SHAPE, configuration(precision="float32").update) == 576
    assert layer_bytes(SHAPE, configuration(precision="bfloat16").update) == 400
    lora = configuration(precision="float32", lora={"rank": 2, "alpha": 2.0}).update
    assert layer_bytes(SHAPE, lora) == 512


def test_an_update_by_hand() -> None:
    update = configuration(precision="float32", gradient_checkpointing=False).update
    found = needs(SHAPE, 1000, update, 50, 1000, on_gpu=False, is_shared=False)
    assert found.held == {"weights": 4000, "gradients": 4000, "moments": 8000, "reference": 4000}
    # Two layers of 576 bytes a token; the head: three copies of the hidden states, the gradient of its
    # weights, and logits that fit into a chunk; the heap keeps 0.3 of the activations.
    assert found.batch == {"activations": 57600, "head": 4800 + 3200 + 110000, "heap": 17280}
    assert found.total == 20000 + 57600 + 118000 + 17280
    less = update.model_copy(update={"gradient_checkpointing": True})
    # Each layer's input, 4 x 8 bytes of a token, and one layer again.
    found = needs(SHAPE, 1000, less, 50, 0, on_gpu=True, is_shared=False)
    assert found.batch["activations"] == 3200


def test_what_is_shared_out_is_gathered_a_layer_at_a_time() -> None:
    update = configuration(precision="bfloat16", gradient_checkpointing=True).update
    one, shared = (
        needs(SHAPE, 1800, update, 50, 1800, on_gpu=True, is_shared=is_shared) for is_shared in (False, True)
    )
    # Of 1,800 parameters 100 x 8 are embeddings, which autocast copies none of, and a reference keeps wide.
    assert one.batch["bfloat16 weights"] == 2 * 1000
    assert one.held["reference"] == 4 * 800 + 2 * 1000
    # Both layers of 500 in bfloat16, the embeddings in float32; of the reference nothing is narrow.
    assert shared.batch["gathered weights"] == 2 * 2 * 500 + 4 * 800
    assert shared.held == {"weights": 7200, "gradients": 7200, "moments": 14400, "reference": 7200}
    assert "bfloat16 weights" not in shared.held | shared.batch


def test_processes_share_what_is_held_and_nothing_else() -> None:
    found = Needs({"weights": 96, "moments": 24}, {"activations": 10, "head": 5})
    totals = [found.beside(4, replicas, count).total for replicas, count in ((1, 1), (2, 1), (2, 4))]
    assert (found.total, totals) == (135, [45, 75, 300])  # 120 / 4 + 15, 120 / 2 + 15, and that four times


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_shape(tied: bool) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, tie_word_embeddings=tied, **NUMBERS)
    family: Any = transformers.LlamaForCausalLM
    model: PreTrainedModel = family(config)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    shape = shape_of(config)
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters()) - norms


def test_layers_that_keep_a_state_are_told() -> None:
    """Whose bytes follow from no number of a shape."""
    for config, recurrent in (
        (transformers.LlamaConfig(**NUMBERS), False),
        (transformers.Gemma3TextConfig(), False),  # sliding and full attention
        (transformers.Qwen3NextConfig(), True),
        (transformers.BambaConfig(), True),
    ):
        shape = shape_of(config)
        assert shape is not None
        assert shape.recurrent == recurrent


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["down_proj"]])
def test_parameters_of_an_adapter(targets: list[str] | None) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, targets=targets)
    model = model_of("Llama", 2)
    shape = shape_of(model.config)
    assert shape is not None
    add_adapter(model, lora, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(shape, lora) == trained


def sized(prompts: int = 4, samples: int = 8, response: int = 100, **update: Any) -> Config:
    config = configuration(**update)
    generate = {"prompts_per_iteration": prompts, "samples_per_prompt": samples, "max_new_tokens": response}
    return config.model_copy(update={"generate": config.generate.model_copy(update=generate)})


@pytest.mark.parametrize(
    ("config", "on_gpu", "tokens"),
    [
        (sized(), False, 3600),  # all of it: 4 x (100 + 8 x 100)
        (sized(max_tokens_per_batch=2000), False, 2000),
        (sized(prompts=40), False, 4096),  # more are no faster on a CPU
        (sized(prompts=40), True, 16384),
        (sized(), True, 4096),  # whole multiples of 512
        (sized(samples=80), False, 8100),  # a group stays together
        (sized(samples=80, max_tokens_per_batch=2000), False, 2000),  # where it may
        (sized(max_tokens_per_batch=50), False, 200),  # one rollout is read whatever it takes
        (sized(steps_per_iteration=4), False, 900),  # a step of one group
        (sized(prompt_sharing="off", steps_per_iteration=4), False, 1600),  # 8 x 200
        (sized(prompts=2, replay_iterations=1), False, 3600),
    ],
)
def test_the_longest_micro_batch(config: Config, on_gpu: bool, tokens: int) -> None:
    assert longest_batch(config, 100, on_gpu=on_gpu) == tokens


def test_no_micro_batch_is_longer(still: Path) -> None:
    """Of what layout.plan() makes of the longest rollouts that there can be."""

    config = sized(prompts=3, samples=5, response=40)
    B = 15
    rollouts = Rollouts(
        keys=np.array([(0, row // 5, row % 5) for row in range(B)]),
        prompts=[np.arange(10) + row // 5 for row in range(B)],
        responses=[np.zeros(40, dtype=np.int64)] * B,
        masks=[np.ones(40, dtype=bool)] * B,
        old_logprobs=[np.zeros(40, dtype=np.float32)] * B,
        advantages=np.ones(B),
        temperatures=np.ones(B),
    )
    cost = cost_of(load_model(still, "cpu"), "shared")
    for most in (50, 130, 210, 430, 10_000):
        update = config.update.model_copy(update={"max_tokens_per_batch": most})
        batches = plan(rollouts, np.arange(B), most, "shared", cost)
        largest = max(
            len(batch) * max(sum(tree.num_tokens for tree in sequence) for sequence in batch)
            for batch in batches
        )
        told = longest_batch(config.model_copy(update={"update": update}), 10, on_gpu=False)
        assert largest <= told <= max(most, 50)


LORA: dict[str, Any] = {"lora": {"rank": 16, "alpha": 32.0}}
QWEN = {
    "0.5B": Shape(24, 896, 4864, 896, 128, 151936, tied=True),
    "1.5B": Shape(28, 1536, 8960, 1536, 256, 151936, tied=True),
    "7B": Shape(28, 3584, 18944, 3584, 512, 152064, tied=False),
}


def row(name: str, lora: bool) -> str:
    """A row of the table in docs/scaling.md."""
    shape, adapter = QWEN[name], LORA if lora else {}
    kept, again = (
        needs(
            shape,
            shape.parameters,
            configuration(precision="bfloat16", gradient_checkpointing=checkpointing, **adapter).update,
            8192,
            0 if lora else shape.parameters,
            on_gpu=True,
            is_shared=False,
        )
        for checkpointing in (False, True)
    )
    rest = sum(kept.batch.values()) - kept.batch["activations"]
    numbers = (
        sum(kept.held.values()),
        kept.batch["activations"],
        again.batch["activations"],
        rest,
        kept.total,
        again.total,
    )
    cells = [name, "LoRA" if lora else "all", *(f"{number / 2**30:,.1f}" for number in numbers)]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_the_page_is_computed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    rows = [row(name, lora) for name in QWEN for lora in (False, True)]
    assert "\n".join(rows) in page, "\n".join(rows)
