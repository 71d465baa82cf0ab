"""rubric: rubric + one rollout -> the question to a judge; the judge's answer -> the reward

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
from grpo.errors import UsageError
from grpo.score.functions.built_in import Text
from grpo.score.outcome import Outcome, one_line

FILE = re.compile(r"\S+\.(md|txt)")
PLACEHOLDER = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
_SHOWN = 80  # characters of an answer in an error; the whole of it is in `judgements`


def where(reward: RewardConfig) -> str:
    """A reward in a message."""
    return f"score.rewards: {reward.name}"


def rubric_of(reward: RewardConfig, folder: Path, columns: Collection[str] | None = None) -> str:
    """The text of a judge's rubric. Raises UsageError for a file or a placeholder that is not there."""
    assert reward.judge is not None
    text = read_rubric(where(reward), reward.judge.rubric, folder)
    check_placeholders(where(reward), text, columns)
    return text


def read_rubric(where: str, rubric: str, folder: Path) -> str:
    """The text of a rubric, which may be the name of a file in `folder`.

    where: the reward, for messages. Raises UsageError for a file that is not there or not UTF-8.
    """
    if not FILE.fullmatch(rubric):
        return rubric
    path = folder / rubric
    text = read_text(path, f"{where}: rubric {path}")
    if not text.strip():
        raise UsageError(f"{where}: rubric {path}: is empty; it holds the question to the judge")
    return text


def check_placeholders(where: str, text: str, columns: Collection[str] | None) -> None:
    """Raise UsageError unless the rubric asks for the response, and for nothing that is not there.

    columns: the data set's column names; None where they are not known yet.
    """
    names = {match[2] for match in PLACEHOLDER.finditer(text) if match[2]}
    if "response" not in names:
        raise UsageError(
            f"{where}: rubric: has no {{response}}, so every rollout would get the same question"
        )
    known = ["prompt", "response", *(columns or ())]
    for name in sorted(names - set(known)) if columns is not None else ():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {{{near[0]}}}?" if near else f"there are {', '.join(known)}"
        raise UsageError(
            f"{where}: rubric: {{{name}}} is not a column; {hint} ({{{{{name}}}}} is the text itself)"
        )


def question(text: str, prompt: Text, response: str, columns: Mapping[str, Any]) -> str | None:
    """The rubric with its placeholders filled; None where the rubric needs an `answer` that is null."""
    values = {**columns, "prompt": _shown(prompt), "response": response}
    if any(match[2] == "answer" and values["answer"] is None for match in PLACEHOLDER.finditer(text)):
        return None
    return PLACEHOLDER.sub(lambda match: f"{{{match[1]}}}" if match[1] else _shown(values[match[2]]), text)


def read_score(judge: JudgeConfig, answer: str) -> Outcome:
    """The reward that an answer gives; an answer that cannot be read is an error with its first words."""
    lines = answer.replace("\r\n", "\n")  # $ matches before \n alone
    found = list(dict.fromkeys(re.findall(judge.pattern, lines, re.MULTILINE)))
    if len(found) != 1:
        said = f"gives {len(found)} scores, {', '.join(found[:5])}" if found else "has no score"
        return _unreadable(said, answer)
    if judge.grades:
        value = judge.grades.get(found[0])
        return (
            Outcome(value, "ok") if value is not None else _unreadable(f"says {found[0]!r}, no grade", answer)
        )
    try:
        value = float(found[0])
    except ValueError:
        return _unreadable(f"says {found[0]!r}, no number", answer)
    if not math.isfinite(value):
        return Outcome(None, "nonfinite", f"the judge gave {value}")
    if judge.scale is None:
        return Outcome(value, "ok")
    low, high = judge.scale
    if not low <= value <= high:
        return _unreadable(f"says {value:g}, outside {low:g} to {high:g}", answer)
    return Outcome((value - low) / (high - low), "ok")


def _unreadable(what: str, answer: str) -> Outcome:
    more = "..." if len(answer) > _SHOWN else ""
    return Outcome(None, "error", one_line(f"the judge's answer {what}: {answer[:_SHOWN]!r}{more}"))


def _shown(value: Any) -> str:
    """A column's value as text; messages as `role: content`, a blank line between them."""
    if isinstance(value, list) and all(isinstance(each, dict) and "content" in each for each in value):
        return "\n\n".join(f"{message.get('role', '')}: {message['content'] or ''}" for message in value)
    return "" if value is None else str(value)
