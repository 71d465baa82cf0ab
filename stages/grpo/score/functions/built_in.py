"""built_in: the reward functions that are here, with TRL's signature; see docs/rewards.md.

`f(prompts, completions, **columns)`: lists of equal length (one group), a list of `float | None` back.
"""

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from grpo.score.functions.number import Number, ascii_digits, numbers, plain
from grpo.score.outcome import one_line

Text = str | Sequence[Mapping[str, Any]]  # a prompt or completion: text, or chat messages
Texts = Sequence[Text]
Answers = Sequence[str | None]
Rewards = list[float | None]  # None: the reward does not apply

# `####` counts only with a number right behind it: "#### Step by step" is a Markdown heading. Lengths are
# bounded, so that no response makes the search slow.
NO_NUMBER = re.compile(r"[ *$+(:\-]{0,8}(?:(?:nan|inf|infinity)\b|√)", re.IGNORECASE)
MARKER = re.compile(
    rf"####(?=[ *$+(\-]{{0,8}}\.?[0-9]|{NO_NUMBER.pattern})"
    r"|\\(?:boxed|fbox) ?\{(?=(?P<boxed>[^}]{0,200}))"
    r"|\banswer(?:\s{1,4}is\b|\W{0,4}[:=])(?P<sentence>)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
MAX_SENTENCE = 500  # characters read behind "answer is"
LATEX_MARKS = ("$", "\\boxed", "\\(", "\\[")  # an answer with one of them says where its mathematics is


def exact_answer(prompts: Texts, completions: Texts, answer: Answers, **_: Any) -> Rewards:
    """1.0 where the response equals the answer, both stripped of surrounding whitespace, else 0.0."""
    return _judged(completions, answer, lambda response, right: response.strip() == right.strip())


def gsm8k(prompts: Texts, completions: Texts, answer: Answers, **_: Any) -> Rewards:
    """1.0 where the final number of the response equals that of the answer (18.00 equals 18), else 0.0.

    The answer's number is the first one after its last `####`, or without `####` the first one in it. Which
    number of the response counts: see final_number. Raises ValueError for an answer without a number.
    """

    def is_right(response: str, right: str) -> bool:
        text = plain(right)
        number = next(numbers(text, text.rfind("####") + 1), None)
        if number is None or number.value is None:
            found = "no number" if number is None else "a number that is read as none"
            raise ValueError(f"the answer has {found}: {right[:80]!r}")
        return final_number(response) == number.value

    return _judged(completions, answer, is_right)


def math_verify(prompts: Texts, completions: Texts, answer: Answers, **_: Any) -> Rewards:
    r"""1.0 where the response's final expression equals the answer as mathematics (0.5 is 1/2), else 0.0.

    By the package math-verify, with its own defaults: the final expression is what stands in \boxed{}
    (several boxes are a set), else behind "final answer is", else the last LaTeX or number. An answer is what
    is behind its last `####`, LaTeX with or without its dollars. A number that the package takes out of a
    longer one (2.5 of "2.5 million") is no answer. Raises ValueError for an answer that is no mathematics,
    ImportError where the package is not installed.
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
        text = ascii_digits(response)
        found = parse(text, parsing_timeout=None)
        return bool(verify(gold, found, timeout_seconds=None)) and not _is_part(found, text)

    return _judged(completions, answer, is_right)


def final_number(response: str) -> Fraction | None:
    """The number that a response gives as its answer; None if it has none, or one that is read as none.

    It is read behind the last of these markers that has a number: `#### 18` (the number directly behind it),
    `\\boxed{18}` (inside the braces), `answer is 18`, `answer: 18`, `answer = 18` (in that sentence, or else
    the next number at all). Of several numbers there, the first counts, or with `=` signs the first behind
    the last of them ("the answer is 3 * 6 = 18"). Without a marker, the last number of the response counts.
    What a number is, and that it is read whole: number.py.
    """
    text = plain(response)
    found = list(numbers(text))
    for marker in reversed(list(MARKER.finditer(text)) if found else []):
        if NO_NUMBER.match(text, marker.end()):
            return None
        if (number := _number_behind(marker, text, found)) is not None:
            return number.value
    return found[-1].value if found else None


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
    """1.0 or 0.0 by is_right(response, answer); None where there is no answer, or one that shows nothing."""
    return [
        None if right is None or not one_line(right) else float(is_right(_text(completion), right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def _is_part(found: list[Any], response: str) -> bool:
    """Whether the text that math-verify took is digits that go on in the response: 3 of 3:30, 1 of 1e3."""
    taken = plain(str(found[-1]))
    if len(alone := list(numbers(taken))) != 1 or alone[0].end - alone[0].start < len(taken.strip()):
        return False
    if (value := alone[0].value) is None:
        return re.search("(?<![0-9.])0[0-9]", taken) is not None  # 2024-05-01: a date, and no difference
    text, digits = plain(response), re.compile(rf"(?<![0-9.]){re.escape(taken.strip())}(?![0-9])")
    holds = [one for one in numbers(text) if one.value == value or digits.search(text, one.start, one.end)]
    return bool(holds) and holds[-1].value != value


def _text(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def _number_behind(marker: re.Match[str], text: str, found: list[Number]) -> Number | None:
    start, number = marker.end(), None
    if marker["boxed"] is not None:
        return _stated_number(text, start, start + len(marker["boxed"]), found)
    if marker["sentence"] is not None:
        sentence = SENTENCE_END.split(text[start : start + MAX_SENTENCE], maxsplit=1)[0]
        number = _stated_number(text, start, start + len(sentence), found)
    return _first_number(found, start, len(text)) if number is None else number


def _stated_number(text: str, start: int, end: int, found: list[Number]) -> Number | None:
    number = _first_number(found, text.rfind("=", start, end) + 1, end) if "=" in text[start:end] else None
    return _first_number(found, start, end) if number is None else number


def _first_number(found: list[Number], start: int, end: int) -> Number | None:
    place = bisect_left(found, start, key=lambda number: number.start)
    return found[place] if place < len(found) and found[place].start < end else None
