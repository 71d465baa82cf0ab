"""The reward of capitals: whether a response names the city."""

from typing import Any
from unicodedata import combining, normalize


def names_city(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the response holds the answer, whatever its case and accents, else 0.0."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(plain(city) in plain(text)) for text, city in zip(texts, answer, strict=True)]


def plain(text: str) -> str:
    """In lower case and without accents."""
    return "".join(each for each in normalize("NFKD", text.casefold()) if not combining(each))
