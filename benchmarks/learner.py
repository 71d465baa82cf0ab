"""The learner alone: speed against the matmul peak of the same process, and memory.

update    One optimiser step and the reference pass of a 19M-parameter Qwen2 in float32, K = 8, with long
          prompts and with short ones. Its own operations: 6 x parameters x tokens that go through the model
          (each prompt once a tree) for the step, 2 x for the reference, and attention over the tiles that
          are computed, at the rate of the largest matmul that this process reaches in the same round.
memory    Peak memory of an update by the number of rollouts, each in a process of its own.
whole     A step of a 0.5B-parameter model (151,936 tokens of vocabulary) with the head in chunks and with
          all logits at once, alternating.

python benchmarks/learner.py [update | memory | whole]... > benchmarks/learner.txt
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from machine import describe
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo import tables
from grpo.config import UpdateConfig
from grpo.update.batch import READ, Rollouts, kept_rollouts
from grpo.update.given import Step
from grpo.update.layout import PADDING, build, plan
from grpo.update.learner import Learner
from grpo.update.objective import Stored
from grpo.update.tree_attention import Place

K = 8
VOCABULARY = 258
ROUNDS = 7
KEY_TILE = 512  # keys that torch's attention on a CPU takes at a time; masked ones in the last are computed
# Name, prompts, tokens of a prompt, tokens of the shortest and of the longest response.
SHAPES = [
    ("4 prompts of 384 tokens, responses of 48", 4, 384, 48, 48),
    ("16 prompts of 8 tokens, responses of 8-128", 16, 8, 8, 128),
]
# Prompts, tokens of a prompt, tokens of a response; the last number is what grows.
MEMORY = [(64, 2048, 64), (256, 2048, 64), (128, 64, 256), (512, 64, 256)]


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        print(peak_memory(*map(int, sys.argv[2:])))
        return
    print(describe())
    for name in sys.argv[1:] or ["update", "memory", "whole"]:
        print()
        {"update": update, "memory": memory, "whole": whole}[name]()


def update() -> None:
    """Seconds of the reference pass and of the step, against what their operations take at the peak."""
    print(f"update of a 19M-parameter Qwen2, float32, K = {K}; medians of {ROUNDS}")
    with tempfile.TemporaryDirectory() as folder:
        model = write_qwen2(Path(folder), hidden_size=512, intermediate_size=832, num_hidden_layers=8)
        for name, *shape in SHAPES:
            learner = open_learner(model, with_reference=True)
            rollouts = kept_rollouts(shard(0, *shape), advantages(shape[0]))
            seconds, peaks = [], []
            for _ in range(ROUNDS):
                peaks.append(matmul_peak())
                started = time.perf_counter()
                stored = step(learner, rollouts)
                seconds.append(time.perf_counter() - started)
            assert len(stored.policy) == len(rollouts)
            report(name, learner, rollouts, seconds, peaks)


def report(
    name: str, learner: Learner, rollouts: Rollouts, all_seconds: list[float], peaks: list[float]
) -> None:
    config = learner.model.config
    weights = sum(p.numel() for p in learner.model.parameters())
    tokens = computed = seen = 0
    rows, network = np.arange(len(rollouts)), learner.network
    budget = learner.config.max_tokens_per_batch
    for sequences in plan(rollouts, rows, budget, network.layout, network.cost):
        batch = build(rollouts, sequences, "cpu")
        tokens += int((batch.tree_SL != PADDING).sum())
        computed += sum(pairs(tree, KEY_TILE) for tree in batch.trees)
        seen += sum(pairs(tree, 1) for tree in batch.trees)
    linear = 8 * weights * tokens
    # QK' and AV: two products of 2 x hidden per pair and layer; twice that again backward; and the reference.
    attention = 4 * 4 * config.hidden_size * config.num_hidden_layers * computed
    operations = linear + attention
    seconds, peak = statistics.median(all_seconds), statistics.median(peaks)
    ratios = [s * p / operations for s, p in zip(all_seconds, peaks, strict=True)]
    apart = sum(len(rollouts.prompts[i]) + len(rollouts.responses[i]) for i in range(len(rows)))
    print(f"  {name}")
    print(f"    tokens through the model  {tokens:,} ({apart:,} without sharing)")
    print(f"    tokens of rollouts/s      {apart / seconds:,.0f}")
    print(f"    matmul peak               {peak / 1e9:.0f} GFLOP/s")
    share = f"{attention / operations:.0%} attention, {1 - seen / computed:.0%} of that masked"
    print(f"    operations                {operations / 1e12:.2f} TFLOP ({share})")
    print(f"    seconds                   {seconds:.2f}; {operations / peak:.2f} at the peak")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"    ratio                     {statistics.median(ratios):.2f} ({spread})", flush=True)


def pairs(tree: Place, tile: int) -> int:
    """Pairs of a query and a key where a query meets keys by tiles of `tile`, up to the one it is in."""

    def own(length: int) -> int:
        return sum(min(length, -(-(query + 1) // tile) * tile) for query in range(length))

    prompt, *responses = (int(part.stop - part.start) for part in (tree.prompt, *tree.responses))
    return sum(map(own, (prompt, *responses))) + sum(responses) * prompt


def memory() -> None:
    print("peak memory of an update by the number of rollouts (MiB of its process in all)")
    for shape in MEMORY:
        command = [sys.executable, __file__, "peak", *map(str, shape)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        prompts, prompt, response = shape
        tokens = prompts * K * (prompt + response) / 1e6
        what = f"{prompts * K:5} rollouts, prompt {prompt}, response {response} ({tokens:.1f}M tokens)"
        print(f"  {what}  {float(found):8,.0f}", flush=True)


def peak_memory(num_prompts: int, prompt: int, response: int) -> float:
    """MiB that this process had at most, after a step on rollouts that came shard by shard."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_qwen2(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
        learner = open_learner(model, with_reference=True, max_tokens_per_batch=8192)
        shards = [shard(n, 1, prompt, response, response) for n in range(num_prompts)]
        rollouts = kept_rollouts(pa.concat_tables(shards), advantages(num_prompts))
        step(learner, rollouts)
    # Not ru_maxrss: a process inherits that of the one that started it.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def whole() -> None:
    """Seconds of a step of a 0.5B-parameter model, its head in chunks and at once."""
    shape = (1, 512, 192, 192)
    print("step of a 0.5B-parameter Qwen2 (24 layers, 896 wide, vocabulary 151,936), float32, 2,048 tokens")
    with tempfile.TemporaryDirectory() as name:
        model = write_qwen2(
            Path(name),
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        learner = open_learner(model, with_reference=False)
        rollouts = kept_rollouts(shard(0, *shape), advantages(1))
        form = learner.network.reader.form
        seconds: dict[str, list[float]] = {"in chunks": [], "at once": []}
        for _ in range(3):
            for head, given in (("in chunks", form), ("at once", None)):
                learner.network.reader.form = given
                started = time.perf_counter()
                step(learner, rollouts)
                seconds[head].append(time.perf_counter() - started)
    medians = {head: statistics.median(found) for head, found in seconds.items()}
    for head, median in medians.items():
        print(f"  {head:10} {median:6.1f} s")
    print(f"  ratio      {medians['in chunks'] / medians['at once']:6.2f}", flush=True)


def step(learner: Learner, rollouts: Rollouts) -> Stored:
    """The reference pass, where there is one, and one optimiser step on everything."""
    rows, stored = np.arange(len(rollouts)), Stored()
    if learner.config.kl_coefficient:
        stored.reference = learner.reference_logprobs(rollouts, rows)
    counts = Step(len(rollouts), int(rollouts.num_tokens.sum()), max_new_tokens=128)
    _, logprobs = learner.step(rollouts, rows, counts, stored)
    stored.keep(logprobs, 0)
    return stored


def open_learner(model: Path, *, with_reference: bool, max_tokens_per_batch: int = 16384) -> Learner:
    kl_coefficient = 0.01 if with_reference else 0.0
    config = UpdateConfig(kl_coefficient=kl_coefficient, max_tokens_per_batch=max_tokens_per_batch)
    learner = Learner(config, "cpu")
    learner.load(model, None, "start")
    if with_reference:
        learner.load_reference(model)
    return learner


def write_qwen2(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    } | changes
    Qwen2ForCausalLM(Qwen2Config(max_position_embeddings=4096, **values)).save_pretrained(folder / "model")
    return folder / "model"


def shard(first: int, num_prompts: int, prompt: int, shortest: int, longest: int) -> pa.Table:
    """Rollouts of `num_prompts` groups from group `first` on, of random tokens."""
    draw = np.random.default_rng(first)
    rows = []
    for group in range(first, first + num_prompts):
        prompt_ids = draw.integers(256, size=prompt).tolist()
        for sample in range(K):
            length = int(draw.integers(shortest, longest + 1))
            rows.append(
                {
                    **dict(zip(tables.KEY, (0, group, sample), strict=True)),
                    "prompt_token_ids": prompt_ids,
                    "response_token_ids": draw.integers(256, size=length).tolist(),
                    "response_mask": [True] * length,
                    "old_logprobs": [-5.5] * length,
                    "temperature": 1.0,
                }
            )
    return pa.Table.from_pylist(rows, schema=tables.schema("rollouts")).select(READ)


def advantages(num_prompts: int) -> pa.Table:
    keys = [(0, group, sample) for group in range(num_prompts) for sample in range(K)]
    values = np.random.default_rng(1).normal(size=len(keys)).tolist()
    rows = [
        {**dict(zip(tables.KEY, key, strict=True)), "advantage": value, "keep": True}
        for key, value in zip(keys, values, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema("advantages"))


def matmul_peak() -> float:
    """Floating-point operations a second of the best of a few float32 products."""
    best = 0.0
    for size in (1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
