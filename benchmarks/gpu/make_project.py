"""A project for check.sh: a random Qwen3 of 0.6B with a tokenizer, prompts, a reward and pipeline.yaml."""

import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DRY = os.environ["DRY"] == "1"
TINY: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PIPELINE = """\
run: check
iterations: 6
model: model
prompts: {{source: prompts.jsonl}}
generate:
  engine: {engine}
  prompts_per_iteration: {groups}
  samples_per_prompt: {samples}
  max_new_tokens: {tokens}
  rollouts_per_shard: {shard}
score:
  rewards: [{{function: "reward:letters"}}]
update: {{learning_rate: 1.0e-6, precision: {precision}, max_tokens_per_batch: {batch}}}
"""
REWARD = """\
def letters(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
"""


def main() -> None:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 20 if DRY else 150]
    texts = [path.read_text(errors="ignore") for path in paths]
    tokenizer = make_tokenizer(texts)
    model = make_model()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    config = GenerationConfig(eos_token_id=0, pad_token_id=1)  # type: ignore[no-untyped-call]
    config.save_pretrained("model")
    write_prompts(tokenizer, texts)
    Path("reward.py").write_text(REWARD)
    sizes = {"tokens": 96, "groups": 32, "samples": 4, "shard": 16, "batch": 512}
    if not DRY:
        sizes = {"tokens": 512, "groups": 64, "samples": 8, "shard": 128, "batch": 16384}
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    text = PIPELINE.format(engine=os.environ["ENGINE"], precision=precision, **sizes)
    Path("pipeline.yaml").write_text(text)
    parameters = sum(p.numel() for p in model.parameters())  # the tied head counts: a token meets it
    Path("model.json").write_text(json.dumps({"parameters": parameters, "flop_per_token": 6 * parameters}))
    print(f"{parameters:,} parameters, {len(tokenizer):,} tokens")


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600 if DRY else 32_000,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    kept: Any = PreTrainedTokenizerFast  # transformers' own is not typed
    tokenizer: PreTrainedTokenizerFast = kept(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    return tokenizer


def make_model() -> Qwen3ForCausalLM:
    """In bfloat16 on a CPU; its logits are spread over some nats, so that a difference shows."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **(TINY if DRY else QWEN3_0_6B),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(6)
    plain: torch.nn.Module = model  # transformers' own to() is not typed
    plain.to(torch.bfloat16).cpu()
    return model


def write_prompts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    draw, length = random.Random(0), 16 if DRY else 128
    ids = tokenizer("\n".join(texts))["input_ids"]
    starts = [draw.randrange(len(ids) - length) for _ in range(64)]
    rows = [{"prompt": tokenizer.decode(ids[start : start + length])} for start in starts]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
