"""Speed of the built-in engine against `model.generate` of transformers, on this machine.

Both sample K = 8 responses a prompt at temperature 1 from the same float32 sdpa model with the same number
of threads. A token counts when it was sampled up to and including the end-of-sequence token. The engine
also records each token's log-probability; `generate` is not asked for scores, so it does less.
Both get all prompts at once, `generate` left-padded, with num_return_sequences, cache and eos set.

The models: the starter on its own sums, and a random Qwen2 of 19M parameters, which finds all tokens about
equally likely and of which 5 of 258 end a response: lengths of 1 to 128 that average about 50.
Runs of the two sides alternate in one process of one thread. Seconds are its processor time, which is the
wall time of an idle machine and hardly changes on a busy one. The ratio is the median of each pair's.

Run by generate.py.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from grpo.generate.engines.protocol import Request, Sampling, group_seed
from grpo.generate.engines.transformers_engine import TransformersEngine
from grpo.models import starter_model
from grpo.models.loading import eos_token_ids, load_model
from grpo.prompts import arithmetic

NUM_SAMPLES = 8
VOCABULARY = 258  # of both models, and the starter's padding is its last token
PAD_ID = 257
# The end has probability p = 5 / 258 everywhere: the mean of 1 to 128 is (1 - (1 - p)^128) / p = 47 tokens.
EOS_IDS_19M = [252, 253, 254, 255, 256]
# Prompts, and the tokens of the shortest and of the longest.
SHAPES_19M = [(8, 16, 16), (8, 8, 24), (4, 150, 250)]


@dataclass(frozen=True)
class Case:
    name: str
    checkpoint: Path
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    num_runs: int


@dataclass(frozen=True)
class Run:
    seconds: float
    num_tokens: list[int]  # of each response

    @property
    def tokens_per_s(self) -> float:
        return sum(self.num_tokens) / self.seconds


def main() -> None:
    torch.set_num_threads(1)
    print("built-in engine against model.generate of transformers, one thread")
    print(f"K = {NUM_SAMPLES}, medians of alternating runs, tokens per second of processor time")
    print(f"{'case':<44} {'length':>12} {'generate':>9} {'engine':>9} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            theirs, ours = measured(case)
            lengths = [length for run in ours for length in run.num_tokens]
            shape = f"{statistics.mean(lengths):.0f} ({min(lengths)}-{max(lengths)})"
            speeds = [statistics.median(run.tokens_per_s for run in runs) for runs in (theirs, ours)]
            row = f"{case.name:<44} {shape:>12} {speeds[0]:>9.0f} {speeds[1]:>9.0f}"
            ratio = statistics.median(
                b.tokens_per_s / a.tokens_per_s for a, b in zip(theirs, ours, strict=True)
            )
            print(f"{row} {ratio:>6.2f}", flush=True)


def cases(folder: Path) -> list[Case]:
    small, large = folder / "starter", folder / "qwen2"
    starter_model.ensure(small, lambda *_: None)
    write_qwen2(large)
    tokenizer = AutoTokenizer.from_pretrained(small)
    sums = [tokenizer.encode(row["prompt"]) for row in arithmetic.training_rows()]
    arithmetic_cases = [Case(f"starter, {n} sums", small, sums[:n], 8, 31) for n in (32, 80)]
    return arithmetic_cases + [
        Case(
            f"19M, {num_prompts} prompts of {shortest}-{longest} tokens",
            large,
            random_prompts(num_prompts, shortest, longest),
            128,
            3,
        )
        for num_prompts, shortest, longest in SHAPES_19M
    ]


def random_prompts(num_prompts: int, shortest: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(num_prompts * 1000 + longest)
    lengths = torch.randint(shortest, longest + 1, (num_prompts,), generator=generator).tolist()
    return [torch.randint(0, PAD_ID, (length,), generator=generator).tolist() for length in lengths]


def write_qwen2(path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=832,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = EOS_IDS_19M
    model.generation_config.pad_token_id = PAD_ID
    model.save_pretrained(path)


def measured(case: Case) -> tuple[list[Run], list[Run]]:
    """Runs of model.generate and of the engine, alternating, after a short one of each to warm up."""
    model: Any = load_model(case.checkpoint, "cpu")
    engine = TransformersEngine("cpu", max_rows_per_batch=NUM_SAMPLES * len(case.prompts))
    engine.load(case.checkpoint)
    eos_ids = eos_token_ids(case.checkpoint)
    theirs, ours = [], []
    warm_up = replace(case, max_new_tokens=2)
    run_generate(model, warm_up, eos_ids, 0)
    run_engine(engine, warm_up, 0)
    for run in range(case.num_runs):
        theirs.append(timed(partial(run_generate, model, case, eos_ids, run)))
        ours.append(timed(partial(run_engine, engine, case, run)))
    return theirs, ours


def timed(sample: Callable[[], list[int]]) -> Run:
    started = time.process_time()
    num_tokens = sample()
    return Run(time.process_time() - started, num_tokens)


def run_generate(model: Any, case: Case, eos_ids: frozenset[int], seed: int) -> list[int]:
    torch.manual_seed(seed)
    width = max(map(len, case.prompts))
    padding = [width - len(prompt) for prompt in case.prompts]
    tokens = [[PAD_ID] * pad + list(p) for pad, p in zip(padding, case.prompts, strict=True)]
    mask = [[0] * pad + [1] * len(p) for pad, p in zip(padding, case.prompts, strict=True)]
    output_BT = model.generate(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=NUM_SAMPLES,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=sorted(eos_ids),
        pad_token_id=PAD_ID,
        use_cache=True,
    )[:, width:]
    return [response_length(row, eos_ids) for row in output_BT.tolist()]


def response_length(row: Sequence[int], eos_ids: frozenset[int]) -> int:
    """Tokens up to and including the first that ends a response; what follows is padding."""
    return next((place for place, token in enumerate(row, 1) if token in eos_ids), len(row))


def run_engine(engine: TransformersEngine, case: Case, seed: int) -> list[int]:
    first = [group_seed(seed, 0, group) for group in range(len(case.prompts))]
    requests = [
        Request(group, prompt, range(first[group], first[group] + NUM_SAMPLES))
        for group, prompt in enumerate(case.prompts)
    ]
    groups = engine.sample([requests], Sampling(1.0, case.max_new_tokens), lambda *_: None)
    return [len(sample.token_ids) for group in groups for sample in group.samples]
