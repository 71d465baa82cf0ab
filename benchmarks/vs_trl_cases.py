"""The cases of vs_trl.py: model, tokenizer and prompts on disk, the same files for both sides.

The model has 19M random parameters and finds all tokens about equally likely. In the short case 3 of its 258
tokens end a response: lengths of 1 to 128 that average about 67, as evenly spread lengths of 8 to 128 would.
In the long case the token that ends a response is one that the model does not have: all have 48 tokens.
"""

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generate_builtin import PAD_ID, VOCABULARY, write_qwen2
from transformers import GenerationConfig

from grpo.models import starter_model

K = 8
LEARNING_RATE = 1e-6  # TRL's default; so small that the lengths of random responses stay as they are


@dataclass(frozen=True)
class Case:
    name: str
    num_prompts: int
    shortest: int  # tokens of a prompt
    longest: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]

    @property
    def num_rollouts(self) -> int:
        return self.num_prompts * K

    @property
    def title(self) -> str:
        prompt = f"{self.shortest}-{self.longest}" if self.shortest < self.longest else str(self.longest)
        limit = "exactly" if self.eos_ids == (VOCABULARY,) else "up to"
        return (
            f"{self.name}: {self.num_prompts} prompts of {prompt} tokens, K = {K},"
            f" responses of {limit} {self.max_new_tokens} tokens"
        )


CASES = (
    Case("short", 16, 6, 10, 128, (254, 255, 256)),
    Case("long", 4, 384, 384, 48, (VOCABULARY,)),
)


def write_case(folder: Path, case: Case) -> None:
    """`model/` and `prompts.jsonl`."""
    model = folder / "model"
    write_qwen2(model)
    generation: Any = GenerationConfig
    generation(eos_token_id=list(case.eos_ids), pad_token_id=PAD_ID).save_pretrained(model)
    tokenizer = starter_model.build_tokenizer()
    if VOCABULARY in case.eos_ids:
        tokenizer.add_special_tokens({"eos_token": "<|never|>"})
        assert tokenizer.eos_token_id == VOCABULARY
    tokenizer.save_pretrained(model)
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(case)]
    (folder / "prompts.jsonl").write_text("".join(rows))


def prompts(case: Case) -> list[str]:
    """Random letters; a letter is a token."""
    draw = random.Random(0)
    lengths = [draw.randint(case.shortest, case.longest) for _ in range(case.num_prompts)]
    return ["".join(draw.choices(string.ascii_lowercase, k=length)) for length in lengths]
