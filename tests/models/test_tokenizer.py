from pathlib import Path

import pytest
from tests.inspect.report.runs import make_run, row
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from grpo.artifacts import CHECKPOINT, POLICY, Plan, Product, Staging
from grpo.models.tokenizer import FILE, many_pieces, pieces, tokenizer_of


@pytest.fixture
def bytewise() -> Tokenizer:
    """A token is a byte; 256 is the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def texts(tokenizer: Tokenizer, *rows: list[int]) -> list[list[str]]:
    found, places, _ = many_pieces(tokenizer, list(rows))
    return [[found[place] for place in row] for row in places]


def test_pieces_join_to_the_text(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / FILE))
    ids = tokenizer.encode("1+2=3").ids
    assert pieces(tokenizer, ids) == ["1", "+", "2", "=", "3"]
    assert pieces(tokenizer, []) == []


def test_a_character_of_several_tokens_is_at_the_last(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("aé€").ids  # 1, 2 and 3 bytes, a token each
    assert pieces(bytewise, ids) == ["a", "", "é", "", "", "€"]
    assert pieces(bytewise, ids[:2]) == ["a", "\ufffd"]  # cut off: shown as what it is


def test_many_rows_have_the_pieces_of_each(bytewise: Tokenizer) -> None:
    rows = [[*bytewise.encode(text).ids, 256] for text in ("aé€é", "é", "€ab", "")]
    rows.append(bytewise.encode("a€").ids[:3])  # cut off within a character
    found, places, special = many_pieces(bytewise, rows)
    assert [[found[place] for place in row] for row in places] == [pieces(bytewise, row) for row in rows]
    assert [found[place] for place in special] == ["<|end|>"]
    assert found[0] == "<|end|>"  # the most frequent: four times, `a` three times
    assert many_pieces(bytewise, []) == ([], [], [])


def test_bytes_that_are_no_character_are_shown_as_such(bytewise: Tokenizer) -> None:
    lead, middle = bytewise.encode("é").ids
    [a] = bytewise.encode("a").ids
    assert texts(bytewise, [lead, a], [middle, middle, a]) == [["\ufffd", "a"], ["", "\ufffd\ufffd", "a"]]


def test_a_token_that_the_tokenizer_does_not_know_is_its_id(bytewise: Tokenizer) -> None:
    assert texts(bytewise, [999]) == [["<id 999>"]]


def test_sentencepiece_writes_spaces_and_bytes_its_own_way() -> None:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "\u2581the": 2, "r\u2581e": 3, "<0x82>": 4, "<0xAC>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    assert texts(tokenizer, [2, 1, 4, 5, 3, 6]) == [[" the", "", "", "€", "r e", "</s>"]]


def test_wordpiece_joins_what_begins_with_two_hashes() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert texts(tokenizer, [1, 2]) == [[" un", "do"]]


def test_the_tokenizer_is_that_of_the_newest_policy_on_disk(tmp_path: Path, bytewise: Tokenizer) -> None:
    run = make_run(tmp_path, [row(0, 0, 0), row(1, 0, 0)])
    own = run.folder(CHECKPOINT, 0) / POLICY
    Staging(run, Plan("update", 1, "update", 0, {}, {}), 0).commit(Product({"policy": "p1"}, [], {}))
    staging = Staging(run, Plan(CHECKPOINT, 1, CHECKPOINT, 0, {}, {"policy@1": "p1"}), 0)
    record = staging.write_bytes(POLICY, FILE, bytewise.to_str().encode())
    staging.commit(Product({}, [record], {"weights": ""}))
    for path, special in ((own, "<|end|>"), (tmp_path / "model", "<|endoftext|>")):
        tokenizer = tokenizer_of(run)
        assert tokenizer is not None
        assert tokenizer.id_to_token(256) == special
        (path / FILE).unlink()
    assert tokenizer_of(run) is None
