from pathlib import Path

import numpy as np
from tests.inspect.report.runs import make_run, row
from tokenizers import AddedToken, Tokenizer, decoders, models

from grpo.artifacts import Run
from grpo.inspect.report.tokens import bytes_of, special_texts, tokenizer_of


def texts(tokenizer: Tokenizer, *ids: int) -> list[bytes]:
    found: list[bytes] = bytes_of(tokenizer, np.array(ids)).to_pylist()
    return found


def test_a_byte_of_a_character_is_that_byte(hand: Run) -> None:
    tokenizer = tokenizer_of(hand)
    assert tokenizer is not None
    assert texts(tokenizer, *range(256)) == [bytes([number]) for number in range(256)]
    assert texts(tokenizer, 256, 999) == [b"<|endoftext|>", b"<id 999>"]
    assert special_texts(tokenizer) == ["<|endoftext|>", "<|pad|>"]


def test_sentencepiece_writes_spaces_and_bytes_its_own_way() -> None:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "\u2581the": 2, "r\u2581e": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    assert texts(tokenizer, 1, 2, 3, 4) == [b"\xe2", b" the", b"r e", b"</s>"]


def test_any_other_tokenizer_is_asked() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert texts(tokenizer, 1) == [b"un"]


def test_without_a_tokenizer_json_there_is_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(0, 0, 0)])
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert tokenizer_of(run) is None
