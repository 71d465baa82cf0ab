"""tokenizer: the tokenizer of a run, from its own checkpoints, and the text that each token adds."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from grpo.artifacts import CHECKPOINT, POLICY, ActiveRun, durable_policies
from grpo.errors import CorruptError, InputError, first_line
from grpo.models.find import BUILT_IN, starter_folder

FILE = "tokenizer.json"
_MOST_GROWTH = 1000
_WRITTEN = ("content", "prepend", "replacement", "prefix", "suffix")  # what parts write, as they call it
_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character yet
_CHARACTER_BYTES = 4  # the longest character of UTF-8: what more tokens do not complete is none


def tokenizer_of(run: ActiveRun) -> Tokenizer | None:
    """The tokenizer of the newest policy that is on disk, or of the starting one: all of them have the same.

    None where none of the folders has a tokenizer.json. Raises CorruptError (exit 6) for one that is none.
    """
    held = durable_policies(run)[:0:-1]
    folders = [run.folder(CHECKPOINT, number - 1) / POLICY for number in held]
    for folder in filter(None, [*folders, starting_policy(run)]):
        with suppress(InputError):  # dropped meanwhile, moved, or of an old format
            return tokenizer_at(folder)
    return None


def tokenizer_at(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json. Raises InputError, CorruptError."""
    try:
        text = (checkpoint / FILE).read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{checkpoint}: has no {FILE}, which is needed to read token by token") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        raise CorruptError(f"{checkpoint / FILE}: is no tokenizer: {first_line(error)}") from None
    check_growth(checkpoint, tokenizer)
    return tokenizer


def check_growth(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raise CorruptError for a tokenizer that may write far more than it reads: it would fill the memory."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(tokenizer, name)
        growth = 1 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > _MOST_GROWTH:
            found = f"{name} may make a text {growth:,} times as long"
            raise CorruptError(
                f"{checkpoint / FILE}: its {found}; {_MOST_GROWTH} times is the most that is taken"
            )


def _growth(part: Any) -> int:
    """How many times as long a text may be behind a part of a tokenizer, by what the part writes."""
    if isinstance(part, list):
        return math.prod(map(_growth, part)) if all(map(_is_step, part)) else len(part)
    if not isinstance(part, dict):
        return 1
    own = max([1, *(len(part[key]) for key in _WRITTEN if isinstance(part.get(key), str))])
    return own * math.prod(_growth(inner) for inner in part.values() if isinstance(inner, dict | list))


def _is_step(part: Any) -> bool:
    """Whether it is one of several parts that work behind each other."""
    return isinstance(part, dict) and "type" in part


def starting_policy(run: ActiveRun) -> Path | None:
    """The folder of the policy that the run starts from; None before the run is prepared."""
    manifest = run.manifest("policy", None)
    if manifest is None:
        return None
    name = manifest.config.get("policy")
    # A starter model is beside the runs, wherever the configuration is.
    return starter_folder(run, name) if name in BUILT_IN else run.imports / manifest.summary["policy"]


class TextStream:
    """The text that each token adds to those before. A character of several tokens stands at the last.

    Only what was decoded since the last whole character is decoded again: time is linear in the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids, self._read = list(before), len(before)

    def add(self, number: int, *, last: bool = False) -> str:
        """The text of the next token; nothing while a character is not whole, unless none follows."""
        self._ids.append(number)
        before = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=False)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        num_new = len(self._ids) - self._read
        if text.endswith(_INCOMPLETE) and num_new < _CHARACTER_BYTES and not last:
            return ""
        self._ids, self._read = self._ids[self._read :], num_new
        return text[len(before) :]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds, as TextStream gives it."""
    stream = TextStream(tokenizer)
    return [stream.add(number, last=place == len(ids)) for place, number in enumerate(ids, 1)]


def many_pieces(tokenizer: Tokenizer, rows: list[list[int]]) -> tuple[list[str], list[list[int]], list[int]]:
    """The pieces of many rows, each distinct token decoded once: (texts, places, special).

    places: for each token of each row, where in `texts` its piece is; the most frequent token is at 0.
    special: the places of special tokens.
    """
    ids = [number for number, _ in Counter(chain.from_iterable(rows)).most_common()]
    place_of = {number: place for place, number in enumerate(ids)}
    texts = _alone(tokenizer, ids)
    partial = {number for number, text in zip(ids, texts, strict=True) if _INCOMPLETE in text}
    joined: dict[str, int] = {}  # text of a whole character or of none -> its place

    @cache
    def partial_places(members: tuple[int, ...]) -> list[int]:
        own = pieces(tokenizer, list(members))
        for text in own:
            if text not in joined:
                joined[text] = len(texts)
                texts.append(text)
        return [joined[text] for text in own]

    places: list[list[int]] = [[] for _ in rows]
    for found, row in zip(places, rows, strict=True):
        for is_partial, members in groupby(row, key=partial.__contains__):
            same = tuple(members)
            found += partial_places(same) if is_partial else [place_of[number] for number in same]
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return texts, places, sorted(place_of[number] for number in special & place_of.keys())


def _alone(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to a text; `<id 7>` for one that the tokenizer does not know.

    Each is decoded after itself, since decoders write the first token of a text in a way of their own.
    """
    once, twice = (
        tokenizer.decode_batch([[number] * times for number in ids], skip_special_tokens=False)
        for times in (1, 2)
    )
    added = tokenizer.get_added_tokens_decoder()
    texts = [two[len(one) :] for one, two in zip(once, twice, strict=True)]
    for place, number in enumerate(ids):
        if number in added:
            texts[place] = added[number].content
        elif tokenizer.id_to_token(number) is None:
            texts[place] = f"<id {number}>"
    return texts
