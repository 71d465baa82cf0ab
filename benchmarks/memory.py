"""What `grpo doctor` tells of memory, against what `grpo run` takes: the peak of its process, on a CPU.

Two iterations each of the starter model, and of a Llama of 30M parameters with random weights: two
micro-batches an update, so that gradients, moments and activations are there at once.

OMP_NUM_THREADS=1 python benchmarks/memory.py [CASE]... > benchmarks/memory.txt
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe
from process import GRPO, answer
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.models import starter_model

PROMPT, RESPONSE = 128, 112  # tokens: a group of 8 is 1,024
LLAMA = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=0,
)
STARTER = {"model": "tiny-arithmetic", "prompts": {"source": "arithmetic"}}
STARTER |= {"generate": {"prompts_per_iteration": 32, "samples_per_prompt": 8, "max_new_tokens": 8}}
STARTER |= {"score": {"rewards": [{"function": "exact_answer"}]}}
RANDOM = {
    "model": "llama",
    "prompts": {"source": "prompts.jsonl"},
    "generate": {"prompts_per_iteration": 4, "samples_per_prompt": 8, "max_new_tokens": RESPONSE},
    "score": {"rewards": [{"function": "reward:spread"}]},
}
CASES = {
    "starter, 0.4M": (STARTER, {}),
    "30M": (RANDOM, {"max_tokens_per_batch": 2048}),
    "30M, gradient_checkpointing": (RANDOM, {"max_tokens_per_batch": 2048, "gradient_checkpointing": True}),
    "30M, bfloat16": (RANDOM, {"max_tokens_per_batch": 2048, "precision": "bfloat16"}),
    "30M, LoRA": (RANDOM, {"max_tokens_per_batch": 2048, "lora": {"rank": 16, "alpha": 32.0}}),
    "30M, 4,096 tokens, no KL": (RANDOM, {"max_tokens_per_batch": 4096, "kl_coefficient": 0.0}),
}
MIB = 2**20


def make_project(folder: Path) -> None:
    """A random Llama with the starter's tokenizer, prompts of PROMPT bytes, and a reward that differs."""
    starter_model.sketch(folder / "tiny-arithmetic")
    (folder / "tiny-arithmetic").rename(folder / "llama")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM
    model(LLAMA).save_pretrained(folder / "llama")
    rows = (json.dumps({"prompt": f"{number:04}" * (PROMPT // 4), "answer": "0"}) for number in range(16))
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    code = "def spread(completions, **others):\n    return [float(len(set(text))) for text in completions]\n"
    (folder / "reward.py").write_text(code)


def peak(folder: Path) -> int:
    """Bytes that a run of what `folder` configures holds at most."""
    command = [*GRPO, "run", "--json"]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, (folder, status)
    return usage.ru_maxrss * 1024


def main() -> None:
    """One line a case: what doctor tells, what was measured, and the ratio."""
    print(describe(), "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"), flush=True)
    print(f"{'MiB':<28} {'told':>7} {'measured':>9} {'ratio':>6}   told of", flush=True)
    for name in sys.argv[1:] or CASES:
        project, update = CASES[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make_project(folder)
            config = {"run": "run", "iterations": 2, **project, "update": update}
            (folder / "pipeline.yaml").write_text(json.dumps(config))
            checks = {check["name"]: check for check in answer(folder, "doctor")["checks"]}
            told, parts = checks["memory"]["needed"].split(": ", 1)
            number, unit = told.split()
            mib = float(number.replace(",", "")) * (1024 if unit == "GiB" else 1)
            measured = peak(folder) / MIB
            print(f"{name:<28} {mib:7,.0f} {measured:9,.0f} {mib / measured:6.2f}   {parts}", flush=True)


if __name__ == "__main__":
    main()
