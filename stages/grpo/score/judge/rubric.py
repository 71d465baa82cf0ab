"""rubric: rubric + one rollout -> the question to a judge; the judge's answer -> the reward.

A placeholder is a bare word in braces, so that JSON and most LaTeX in a rubric are text. What is put in is
never looked at for placeholders again: a response cannot ask for the answer.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from grpo.config import JudgeConfig, RewardConfig
from grpo.config.named_files import read_text
from grpo.errors import UsageError, listed
from grpo.score.functions.built_in import Text
from grpo.score.functions.call import no_values
from grpo.score.outcome import Outcome, one_line, outcome_of

FILE = re.compile(r"\S+\.(md|txt)")
PLACEHOLDER = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
PATTERN_S = (
    1.0  # of the pattern on one answer: the one is the user's, the other a model's, and `re` never ends
)
_UNREADABLE = "the judge's answer"
_SHOWN = 80  # characters of an answer in an error; the whole of it is in `judgements`


def rubric_of(
    reward: RewardConfig, folder: Path, columns: Collection[str] | None = None, empty: Collection[str] = ()
) -> str:
    """The text of a judge's rubric, or of the file in `folder` that it names.

    columns: the data set's column names; None where they are not known yet. empty: those that have no value
    in any row. Raises UsageError for a file that is no use, and for a rubric that asks for no response, or
    for what is not there.
    """
    assert reward.judge is not None
    text, place = reward.judge.rubric, f"score.rewards: {reward.name}: rubric"
    if FILE.fullmatch(text):
        path = folder / text
        text = read_text(path, f"{place} {path}")
        if not text.strip():
            raise UsageError(f"{place} {path}: is empty; it holds the question to the judge")
    names = _placeholders(text)
    if "response" not in names:
        raise UsageError(f"{place}: has no {{response}}, so every rollout would get the same question")
    known = ["prompt", "response", *(columns or ())]
    for name in sorted(names - set(known)) if columns is not None else ():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {{{near[0]}}}?" if near else f"there are {listed(known, name)}"
        raise UsageError(f"{place}: {{{name}}} is not a column; {hint} ({{{{{name}}}}} is the text itself)")
    for name in sorted(names & set(empty)):
        raise UsageError(f"{place}: asks for {{{name}}}, {no_values(name)}")
    return text


def question(rubric: str, prompt: Text, response: str, columns: Mapping[str, Any]) -> str | None:
    """The rubric with its placeholders filled; None where the rubric needs an `answer` that is null."""
    values = {**columns, "prompt": _shown(prompt), "response": response}
    if "answer" in _placeholders(rubric) and values["answer"] is None:
        return None
    return PLACEHOLDER.sub(lambda match: f"{{{match[1]}}}" if match[1] else _shown(values[match[2]]), rubric)


def read_score(judge: JudgeConfig, answer: str) -> Outcome:
    """The reward that an answer gives; an answer that cannot be read is an error with its first words."""
    lines = answer.replace("\r\n", "\n")  # $ matches before \n alone
    try:
        matches = compiled(judge.pattern).findall(lines, timeout=PATTERN_S)
    except TimeoutError:
        return _unreadable(f"keeps the pattern busy for more than {PATTERN_S:g} s", answer)
    found = list(dict.fromkeys(matches))
    if len(found) != 1:
        said = f"gives {len(found)} scores, {', '.join(found[:5])}" if found else "has no score"
        return _unreadable(said, answer)
    if judge.grades:
        if found[0] not in judge.grades:
            return _unreadable(f"says {found[0]!r}, no grade", answer)
        return Outcome(judge.grades[found[0]], "ok")
    try:
        value = float(found[0])
    except ValueError:
        return _unreadable(f"says {found[0]!r}, no number", answer)
    if judge.scale is None or not math.isfinite(value):
        return outcome_of(value, "the judge gave")
    low, high = judge.scale
    if not low <= value <= high:
        return _unreadable(f"says {value:g}, outside {low:g} to {high:g}", answer)
    return Outcome((value - low) / (high - low), "ok")


def compiled(pattern: str) -> Any:
    """The pattern, whose search can be given a time. Raises ValueError where only Python's `re` knows it."""
    import regex  # plans read rubrics too, and have no use for it

    try:
        return regex.compile(pattern, regex.MULTILINE | regex.VERSION0)  # which keeps what it has compiled
    except regex.error as error:
        raise ValueError(
            f"pattern: the package regex, which can be stopped, does not know it: {error}"
        ) from None


def _unreadable(what: str, answer: str) -> Outcome:
    more = "..." if len(answer) > _SHOWN else ""
    return Outcome(None, "error", one_line(f"{_UNREADABLE} {what}: {answer[:_SHOWN]!r}{more}"))


def is_unreadable(error: str | None) -> bool:
    """Whether an error of read_score, and none of the endpoint."""
    return error is not None and error.startswith(_UNREADABLE)


def _placeholders(rubric: str) -> set[str]:
    return {match[2] for match in PLACEHOLDER.finditer(rubric) if match[2]}


def _shown(value: Any) -> str:
    """A column's value as text; messages as `role: content`, a blank line between them."""
    if isinstance(value, list) and all(isinstance(each, dict) and "content" in each for each in value):
        return "\n\n".join(f"{message.get('role', '')}: {message['content'] or ''}" for message in value)
    return "" if value is None else str(value)
