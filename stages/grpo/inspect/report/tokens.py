"""tokens: the bytes that each token stands for, from the tokenizer.json of a run's own checkpoints.

Bytes, not text: a token may be a part of a character, and only the bytes of several put together are text.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, pre_tokenizers

from grpo.artifacts import Run

_FILE = "tokenizer.json"
_SPACE = "\u2581"  # what SentencePiece writes for a space


def tokenizer_of(run: Run) -> Tokenizer | None:
    """The tokenizer of the newest policy that is on disk, or of the starting one; None without any."""
    folders = [run.folder("update", number - 1) / "policy" for number in reversed(run.policies()) if number]
    start = run.manifest("policy", None)
    if start is not None and "policy" in start.summary:
        folders.append(run.imports / start.summary["policy"])
    for folder in folders:
        try:
            return Tokenizer.from_str((folder / _FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):  # pruned meanwhile, moved, or of an old format
            continue
    return None


def bytes_of(tokenizer: Tokenizer, ids: np.ndarray) -> pa.Array:
    """The bytes of each of `ids`, a binary array; `<id 7>` for one that the tokenizer does not know."""
    decode = _decoder(tokenizer)
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    found = []
    for number in ids.tolist():
        token = tokenizer.id_to_token(number)
        if number in added or token is None:
            found.append(added.get(number, f"<id {number}>").encode())
        else:
            found.append(decode(number, token))
    return pa.array(found, type=pa.binary())


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """What the special tokens read as, such as <|endoftext|>."""
    added = tokenizer.get_added_tokens_decoder().values()
    return sorted(token.content for token in added if token.special)


def _decoder(tokenizer: Tokenizer) -> Callable[[int, str], bytes]:
    """(id, token as the vocabulary writes it) -> its bytes: by bytes, by SentencePiece, or as text."""
    decoder = tokenizer.decoder
    kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if "ByteLevel" in kinds:
        table = _byte_table()
        return lambda _, token: b"".join(table[c] if c in table else c.encode() for c in token)
    if kinds & {"Metaspace", "Replace", "ByteFallback"}:
        return lambda _, token: _sentencepiece(token)
    return lambda number, _: tokenizer.decode([number], skip_special_tokens=False).encode()


def _sentencepiece(token: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _kinds(decoder: dict[str, Any]) -> set[str]:
    inner = [kind for each in decoder.get("decoders", []) for kind in _kinds(each)]
    return {decoder["type"], *inner}


def _byte_table() -> dict[str, bytes]:
    """GPT-2's characters for bytes: a printable byte stands for itself, the others count on from U+0100."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character) for character in characters if ord(character) < 256}
    others = iter(characters[len(printable) :])
    return {chr(b) if b in printable else next(others): bytes([b]) for b in range(256)}
