"""starter_model: nothing -> tiny-arithmetic, the checkpoint that a first run trains in seconds.

(And small-arithmetic, of 1.3M parameters, that gives the sum 95 % of the time: a teacher for the tiny one.)

A Qwen3 of 0.4M parameters over bytes, like a base model: it can do the task and mostly does not. It answers a
one-digit sum with the sum 30 % of the time ("3+4=" -> "7") and otherwise writes the two digits side by side
("34"): three samples in ten earn the reward, and GRPO has something to find. All hundred sums are in this
warm start. Twenty are held out of GRPO only (prompts/arithmetic.py): accuracy there shows that GRPO moved a
habit over to prompts it never saw, not that it taught addition.

Qwen3 and not Qwen2, because for Qwen2 AutoTokenizer (transformers 5.16 to 5.23) builds its own tokenizer
around the vocabulary it finds, with Unicode normalisation (NFC), and then not every text round-trips.

Shapes: A answers (two for each sum), T tokens of prompt and answer, U the T - 1 tokens that predict one.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grpo.artifacts import files
from grpo.errors import InputError
from grpo.models.refusals import quiet_transformers
from grpo.prompts import arithmetic

FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
EOS = "<|endoftext|>"
PAD = "<|pad|>"
CONTEXT_TOKENS = 2048
# One message a line. The generation prompt is a prefix of the finished turn, and a finished turn ends as
# a response does, with the end-of-sequence token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

SUM_SHARE = 0.3  # of the answers to a prompt are its sum; about what makes groups of 4 to 8 samples differ


class Size(NamedTuple):
    """How large a model is, and how often it answers with the sum."""

    hidden_size: int = 128
    num_layers: int = 2
    sum_share: float = SUM_SHARE


_TINY = Size()
SIZES = {"tiny-arithmetic": _TINY, "small-arithmetic": Size(192, 3, 0.95)}
SEED = 0
STEPS = 200
WARMUP_STEPS = 20
PEAK_LEARNING_RATE = 3e-3
STEPS_PER_REPORT = 20
# One thread gives the same bits whatever the number of cores; for matrices this small, two threads took off
# only about a third of the time.
NUM_THREADS = 1
IGNORED = -100  # the label that cross_entropy leaves out


def ensure(directory: Path, say: Callable[[str], None], stop: Callable[[], object] = lambda: None) -> None:
    """Train the starter model of the name of `directory`, unless it is there; `say` gets lines of progress.

    The directory is complete or absent: it is written beside its place and renamed into it. A second
    process waits for the first. stop: called meanwhile; what it raises, such as Interrupted, ends either.
    Raises InputError where the directory lacks some of its files.
    """
    if not directory.exists():
        files.make_folder(directory.parent)
        lock = FileLock(directory.with_name(f".{directory.name}.lock"))
        with lock.acquire(cancel_check=lambda: bool(stop())):
            if not directory.exists():
                _build(directory, say, stop)
    if missing := [name for name in FILES if not (directory / name).is_file()]:
        raise InputError(
            f"{directory}: not a complete starter model ({', '.join(missing)} missing); "
            "move or delete the folder, and the next run retrains it"
        )


def _build(directory: Path, say: Callable[[str], None], stop: Callable[[], object]) -> None:
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    files.remove(unfinished)  # of a process that was killed: we hold the lock
    tokenizer = build_tokenizer()
    model = train(tokenizer, STEPS, say, SIZES.get(directory.name, _TINY), stop)
    with files.resource_errors(directory), quiet_transformers():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    for path in unfinished.iterdir():  # again: transformers does not sync, and gives no one else rights
        files.write_file(path, path.read_bytes())
    files.sync_folder(unfinished)
    files.move(unfinished, directory)
    files.sync_folder(directory.parent)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: token id = byte value, then end-of-sequence (256) and padding (257).

    Every text round-trips. There are no merges, so nothing is learned and nothing is out of vocabulary.
    """
    # In byte-level BPE a printable byte stands for itself; the others take, in order, what is left.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {character for character in characters if ord(character) < 256}
    others = iter(characters[len(printable) :])
    vocabulary = {byte if byte in printable else next(others): ord(byte) for byte in map(chr, range(256))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (EOS, PAD)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,  # true would turn " ." into "." when decoding
    )


def train(
    tokenizer: PreTrainedTokenizerFast,
    num_steps: int,
    say: Callable[[str], None],
    size: Size = _TINY,
    stop: Callable[[], object] = lambda: None,
) -> Qwen3ForCausalLM:
    """The model after `num_steps` steps on all two hundred answers, each with its share.

    The loss in nats per answer tends to the entropy of the choice, -0.3 log 0.3 - 0.7 log 0.7 = 0.6109.
    Deterministic; leaves the caller's random state and number of threads as they were.
    """
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(SEED)
        torch.set_num_threads(NUM_THREADS)
        try:
            model = _untrained(tokenizer, size)
            _fit(model, tokenizer, num_steps, say, size.sum_share, stop)
        finally:
            torch.set_num_threads(num_threads)
    model.eval()
    return model


def _untrained(tokenizer: PreTrainedTokenizerFast, size: Size = _TINY) -> Qwen3ForCausalLM:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // 64,
        head_dim=64,
        num_key_value_heads=1,  # grouped-query attention, as its larger relatives have
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        dtype=torch.float32,
        bos_token_id=None,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)  # type: ignore[no-untyped-call]
    return model


def _fit(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_steps: int,
    say: Callable[[str], None],
    sum_share: float,
    stop: Callable[[], object],
) -> None:
    ids_AT, labels_AU, share_A = _answers(tokenizer, sum_share)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(1, num_steps + 1):
        stop()
        # Linear warm-up times half a cosine down to almost 0: the shares settle only as the steps get small.
        decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * min(1.0, step / WARMUP_STEPS) * decay
        # Padding stands on the right, where causal attention keeps it from every token that has a label.
        logits_AUV = model(input_ids=ids_AT[:, :-1]).logits
        loss_AU = cross_entropy(logits_AUV.transpose(1, 2), labels_AU, ignore_index=IGNORED, reduction="none")
        loss = (loss_AU.sum(dim=1) * share_A).sum() / share_A.sum()  # a prompt's two shares add up to 1
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % STEPS_PER_REPORT == 0 or step == num_steps:
            say(f"training the starter model: step {step}/{num_steps}, loss {loss.item():.3f}")


def _answers(
    tokenizer: PreTrainedTokenizerFast, sum_share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids_AT (int64), labels_AU (int64, IGNORED but for answer tokens), share_A (float32)."""
    ids, labels, shares = [], [], []
    for row in arithmetic.training_rows() + arithmetic.held_out_rows():
        prompt = tokenizer.encode(row["prompt"])
        digits = row["prompt"][0] + row["prompt"][2]
        for text, share in ((row["answer"], sum_share), (digits, 1 - sum_share)):
            answer = [*tokenizer.encode(text), tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * (len(prompt) - 1) + answer))
            shares.append(share)
    ids_AT = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids_AT, pad_sequence(labels, batch_first=True, padding_value=IGNORED), torch.tensor(shares)
