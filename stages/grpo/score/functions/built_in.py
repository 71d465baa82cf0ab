"""built_in: the reward functions that are here, with TRL's signature; see docs/rewards.md.

`f(prompts, completions, **columns)`: lists of equal length (one group), a list of `float | None` back.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

Text = str | Sequence[Mapping[str, Any]]  # a prompt or completion: text, or chat messages
Texts = Sequence[Text]
Answers = Sequence[str | None]
Rewards = list[float | None]  # None: the reward does not apply

# A sign counts only where no word or closing bracket is before it: "5-3" is 5 and 3, "= -3" and "-$3" are -3.
# Commas group thousands ("1,234" is one number, "3,4" two). A full stop before a digit is a decimal point.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%.])[-\u2212])?(?:[$€£¥] ?(?P<inner_sign>[-\u2212])?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
# `####` counts only with a number right behind it: "#### Step by step" is a Markdown heading. Lengths are
# bounded, so that no response makes the search slow.
MARKER = re.compile(
    r"####(?=[ *$€£¥\-\u2212]{0,8}\.?[0-9](?P<line>))"
    r"|\\(?:boxed|fbox) ?\{(?=(?P<boxed>[^}]{0,200}))"
    r"|\banswer(?:\s{1,4}is\b|\W{0,4}[:=])(?P<sentence>)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
MAX_SENTENCE = 500  # characters read behind "answer is"
LATEX_MARKS = ("$", "\\boxed", "\\(", "\\[")  # an answer with one of them says where its mathematics is
LATEX_IN_NUMBERS = (("{,}", ","), ("\\,", ""), ("\\$", "$"), ("\\%", "%"))  # 1{,}234  1\,234  \$18  18\%


def exact_answer(prompts: Texts, completions: Texts, answer: Answers, **_: Any) -> Rewards:
    """1.0 where the response equals the answer, both stripped of surrounding whitespace, else 0.0."""
    return _judged(completions, answer, lambda response, right: response.strip() == right.strip())


def gsm8k(prompts: Texts, completions: Texts, answer: Answers, **_: Any) -> Rewards:
    """1.0 where the final number of the response equals that of the answer (18.00 equals 18), else 0.0.

    The answer's number is the first one after its last `####`, or without `####` the first one in it. Which
    number of the response counts: see final_number. Raises ValueError for an answer without a number.
    """

    def is_right(response: str, right: str) -> bool:
        number = _first_number(_plain(right).rpartition("####")[2])
        if number is None:
            raise ValueError(f"the answer has no number: {right[:80]!r}")
        return final_number(response) == number

    return _judged(completions, answer, is_right)


def math_verify(prompts: Texts, completions: Texts, answer: Answers, **_: Any) -> Rewards:
    r"""1.0 where the response's final expression equals the answer as mathematics (0.5 is 1/2), else 0.0.

    By the package math-verify, with its own defaults: the final expression is what stands in \boxed{}
    (several boxes are a set), else behind "final answer is", else the last LaTeX or number. An answer is what
    is behind its last `####`, LaTeX with or without its dollars. Raises ValueError for an answer that is no
    mathematics, ImportError where the package is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            f"needs the package math-verify ({error}); pip install 'grpo-stages[math]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off

    def is_right(response: str, right: str) -> bool:
        expression = right.rpartition("####")[2].strip()
        if not any(mark in expression for mark in LATEX_MARKS):
            expression = f"${expression}$"
        # Its time-outs are signals, which do not interrupt what hangs in C: the worker's own watchdog does.
        gold = parse(expression, parsing_timeout=None)
        if not gold:
            raise ValueError(f"the answer is not mathematics: {right[:80]!r}")
        return bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))

    return _judged(completions, answer, is_right)


def final_number(response: str) -> Decimal | None:
    """The number that a response gives as its answer; None if it has none.

    It is read behind the last of these markers that has a number: `#### 18` (the number directly behind it),
    `\\boxed{18}` (inside the braces), `answer is 18`, `answer: 18`, `answer = 18` (in that sentence, or else
    the next number at all). Of several numbers there, the first counts, or with `=` signs the first behind
    the last of them ("the answer is 3 * 6 = 18"). Without a marker, the last number of the response counts.
    Currency signs, thousands commas, units, percent signs and what follows are ignored.
    """
    text = _plain(response)
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    for marker in reversed(list(MARKER.finditer(text, 0, last.end()))):
        if (number := _number_behind(marker, text)) is not None:
            return number
    return _value(last)


def regex_format(prompts: Texts, completions: Texts, *, pattern: str, **_: Any) -> Rewards:
    r"""1.0 where `pattern` matches the whole response as it is (re.fullmatch, DOTALL), else 0.0.

    Example: `<think>.*</think>\s*<answer>.*</answer>\s*`. To look for it anywhere, put `.*` at both ends.
    Raises ValueError for a pattern that is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern is not a regular expression: {error}: {pattern!r}") from error
    return [float(compiled.fullmatch(_text(completion)) is not None) for completion in completions]


def length_penalty(
    completion_ids: Sequence[Sequence[int]], *, max_tokens: int, buffer_tokens: int, **_: Any
) -> Rewards:
    """0 up to `max_tokens - buffer_tokens` response tokens, then linearly down to -1 at `max_tokens`.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13). An end-of-sequence token counts.
    Raises ValueError unless 0 < buffer_tokens <= max_tokens.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"needs 0 < buffer_tokens <= max_tokens, found {buffer_tokens} and {max_tokens}")
    free = max_tokens - buffer_tokens
    return [-min(max(len(ids) - free, 0), buffer_tokens) / buffer_tokens + 0.0 for ids in completion_ids]


BUILT_IN: dict[str, Callable[..., Rewards]] = {
    function.__name__: function
    for function in (exact_answer, gsm8k, math_verify, regex_format, length_penalty)
}


def _judged(completions: Texts, answer: Answers, is_right: Callable[[str, str], bool]) -> Rewards:
    """1.0 or 0.0 by is_right(response, answer); None where there is no answer."""
    return [
        None if right is None else float(is_right(_text(completion), right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def _text(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def _plain(text: str) -> str:
    for latex, plain in LATEX_IN_NUMBERS:
        text = text.replace(latex, plain)
    return text


def _number_behind(marker: re.Match[str], text: str) -> Decimal | None:
    if marker["boxed"] is not None:
        return _stated_number(marker["boxed"])
    start, number = marker.end(), None
    if marker["sentence"] is not None:
        number = _stated_number(SENTENCE_END.split(text[start : start + MAX_SENTENCE], maxsplit=1)[0])
    return _first_number(text, start) if number is None else number


def _stated_number(text: str) -> Decimal | None:
    number = _first_number(text.rpartition("=")[2])
    return _first_number(text) if number is None else number


def _first_number(text: str, start: int = 0) -> Decimal | None:
    match = NUMBER.search(text, start)
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Decimal:
    number = Decimal(match["digits"].replace(",", ""))
    return -number if match["sign"] or match["inner_sign"] else number
