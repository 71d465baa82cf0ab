"""memory: what an update takes, from the shape of its model and its keys, in bytes.

docs/scaling.md derives the formulas, benchmarks/memory.txt holds them against what processes took.
"""

from dataclasses import dataclass

from grpo.config import Config, LoraConfig, UpdateConfig
from grpo.models.head import CHUNK_BYTES, CUDA_CHUNK_BYTES
from grpo.models.size import Shape
from grpo.update.flex_attention import MULTIPLE
from grpo.update.network import CPU_TOKENS

FLOAT32 = 4
MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # of a parameter, two of them
# Logits that fit into one chunk are kept: their log-softmax, its exponentials and what is finite of it, and
# two gradients of their size (models/logprobs.py).
_KEPT_LOGITS = 5.5
_CHUNKS = 3  # of logits that do not fit, at once (models/head.py)
# On a CPU the C library does not give back all that was freed: of what the layers keep, that part, and more
# under an adapter, whose matrices make more that is freed at once. Fitted to benchmarks/memory.txt.
_HEAP, _HEAP_OF_ADAPTER = 0.3, 0.8


@dataclass(frozen=True)
class Needs:
    """Bytes of an update. held: by what it is for, from its beginning to its end; batch: of a micro-batch."""

    held: dict[str, int]
    batch: dict[str, int]

    @property
    def total(self) -> int:
        """Of both."""
        return sum(self.held.values()) + sum(self.batch.values())

    def beside(self, world: int, replicas: int, count: int) -> "Needs":
        """Of `count` of `world` processes, in the same memory: each has a micro-batch.

        replicas: of what is held; the processes of each share one out.
        """
        held = {name: size * count * replicas // world for name, size in self.held.items()}
        return Needs(held, {name: size * count for name, size in self.batch.items()})


def longest_batch(config: Config, longest_prompt: int, *, on_gpu: bool) -> int:
    """Tokens of the longest micro-batch that there can be, as layout.plan() cuts them, padding included."""
    update, generate = config.update, config.generate
    one = longest_prompt + generate.max_new_tokens
    shares = update.prompt_sharing == "auto"
    samples = generate.samples_per_prompt
    group = longest_prompt + samples * generate.max_new_tokens if shares else samples * one
    tree = max(one, min(group, update.max_tokens_per_batch)) if shares else one
    at_once = update.max_tokens_per_batch if on_gpu else min(update.max_tokens_per_batch, CPU_TOKENS)
    rounds = generate.dynamic_sampling.max_rounds if generate.dynamic_sampling else 1
    groups = generate.prompts_per_iteration * rounds * (1 + update.replay_iterations)
    step = -(-groups // update.steps_per_iteration) * group
    found = max(tree, min(at_once, step))
    return -(-found // MULTIPLE) * MULTIPLE if on_gpu else found


def needs(
    shape: Shape,
    parameters: int,
    update: UpdateConfig,
    tokens: int,
    reference_parameters: int,
    *,
    on_gpu: bool,
    is_shared: bool,
) -> Needs:
    """What training takes at its peak, with micro-batches of `tokens`; `update` as plan.resolved() has it.

    reference_parameters: 0 where none is loaded. is_shared: whether several processes have parts of what is
    held, all of which is told.
    """
    trained = parameters if update.lora is None else adapter_parameters(shape, update.lora)
    weights = parameters + (trained if update.lora else 0)
    held = {
        "weights": FLOAT32 * weights,
        "gradients": FLOAT32 * trained,
        "moments": MOMENTS[update.optimizer] * trained,
        "reference": _reference_bytes(shape, update, reference_parameters, is_shared=is_shared),
    }
    each = layer_bytes(shape, update) * tokens
    kept = shape.layers * (FLOAT32 * shape.hidden * tokens if update.gradient_checkpointing else each)
    backward = _backward_bytes(shape, update) * tokens
    if update.gradient_checkpointing:
        backward += each  # one layer at a time is computed again
    head = _head_bytes(shape, update, tokens, on_gpu=on_gpu)
    batch = {"activations": kept, "head": max(head, backward)}
    if is_shared:
        batch["gathered weights"] = _gathered_bytes(shape, update, parameters)
    # Autocast keeps a copy of each weight that trains, and a layer of each that it needs backwards.
    elif update.weights == "bfloat16_master":
        held["bfloat16 weights"] = 2 * parameters
    elif update.precision == "bfloat16" and not (update.lora and update.gradient_checkpointing):
        batch["bfloat16 weights"] = 2 * (parameters - shape.vocabulary * shape.hidden)
    if not on_gpu:
        batch["heap"] = int((_HEAP_OF_ADAPTER if update.lora else _HEAP) * shape.layers * each)
    return Needs(held, batch)


def _gathered_bytes(shape: Shape, update: UpdateConfig, parameters: int) -> int:
    """Embeddings and head in float32, and in the precision a layer, with the next one on its way."""
    rest = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    width = FLOAT32 if update.precision == "float32" else FLOAT32 // 2
    return FLOAT32 * rest + 2 * width * (parameters - rest) // shape.layers


def _reference_bytes(shape: Shape, update: UpdateConfig, parameters: int, *, is_shared: bool) -> int:
    """Linear matrices are held in the precision that they are used in; beside a bfloat16 copy, all is.

    Parts of several processes are in float32 (opening.open_reference).
    """
    if not parameters or update.precision == "float32" or is_shared:
        return FLOAT32 * parameters
    wide = 0 if update.weights == "bfloat16_master" else shape.vocabulary * shape.hidden
    return FLOAT32 * wide + FLOAT32 // 2 * (parameters - wide)


def layer_bytes(shape: Shape, update: UpdateConfig) -> int:
    """What a layer keeps of a token for its backward pass.

    float32: of two norms their input, what is normed and their output, queries, keys, values (a head of each
    for every query) and the attention's output; gate, its activation, up, and their product. Autocast: the
    norms in float32, and each of five products with its own copy in bfloat16. A frozen norm keeps less.
    """
    hidden, queries, inner = shape.hidden, shape.queries, shape.intermediate
    if update.precision == "float32":
        found = 4 * (6 * hidden + 4 * queries + 4 * inner)
    else:
        found = 26 * hidden + 8 * queries + 8 * inner
    if update.lora is not None:
        found -= 8 * hidden
    if shape.normed:  # input of the norm and what is normed
        found += (8 if update.precision == "float32" else 6) * (queries + shape.keys)
    return found


def adapter_parameters(shape: Shape, lora: LoraConfig) -> int:
    """What trains under an adapter. A name that is no matrix of Shape counts as nothing."""
    targets = lora.targets or list(shape.matrices)
    pairs = sum(sum(size) for name, size in shape.matrices.items() if name in targets)
    whole = [name for name in lora.modules_to_save if name in ("lm_head", "embed_tokens")]
    return lora.rank * pairs * shape.layers + len(whole) * shape.vocabulary * shape.hidden


def _backward_bytes(shape: Shape, update: UpdateConfig) -> int:
    """Gradients of a layer's activations that are there at once: of gate, up and their product, and two."""
    width = 4 if update.precision == "float32" else 2
    return width * 3 * shape.intermediate + 8 * shape.hidden


def _head_bytes(shape: Shape, update: UpdateConfig, tokens: int, *, on_gpu: bool) -> int:
    """The output head at its largest: chunks of logits, hidden states and the gradient of its weights."""
    most = CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES
    columns = max(most // (FLOAT32 * tokens), shape.hidden)
    hidden = 3 * FLOAT32 * tokens * shape.hidden
    weight = FLOAT32 * shape.vocabulary * shape.hidden if update.lora is None else 0
    if columns >= shape.vocabulary and update.precision == "float32":
        return hidden + weight + int(_KEPT_LOGITS * FLOAT32 * tokens * shape.vocabulary)
    return hidden + weight + _CHUNKS * FLOAT32 * tokens * min(columns, shape.vocabulary)
