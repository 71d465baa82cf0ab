"""completion: the body of a response -> the judgement in it.

Endpoints differ, and the `openai` package does not check what it is sent: what we store is checked here.
"""

import json
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from grpo.score.outcome import one_line


class Judgement(NamedTuple):
    """What came back for one question. status: `ok` (an answer), `error` or `timeout` (`error` says why)."""

    status: str
    answer: str | None = None
    error: str | None = None
    model: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    attempts: int | None = None


def judgement_of(body: str, attempts: int) -> Judgement:
    """The answer of a chat completion, or an error that says what came instead; attempts: it took so many."""
    try:
        # Through JSON again, since it can carry lone surrogates and neither UTF-8 nor our tables can.
        text = json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8", "replace")
        found = _Completion.model_validate_json(text, strict=True)
    except (ValueError, RecursionError):
        return failure("error", f"not a chat completion: {body[:200]}")
    choice, usage = found.choices[0], found.usage or _Usage()
    answer, refusal = choice.message.content, choice.message.refusal
    if not answer:
        why = f"it refused: {refusal}" if refusal else f"ended by {choice.finish_reason}"
        return failure("error", f"an empty answer ({why})")
    return Judgement(
        "ok",
        answer,
        model=found.model,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        answer_tokens=usage.completion_tokens,
        attempts=attempts,
    )


def failure(status: str, text: str) -> Judgement:
    """A judgement that is none, with one line that says why."""
    return Judgement(status, error=one_line(text))


def _none_if_invalid(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


# Beside the answer: an endpoint that says nonsense here has answered all the same.
_Text = Annotated[str | None, WrapValidator(_none_if_invalid)]
_Count = Annotated[Annotated[int, Field(ge=0, lt=2**31)] | None, WrapValidator(_none_if_invalid)]


class _Message(BaseModel):
    content: str | None = None
    refusal: _Text = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: _Text = None


class _Usage(BaseModel):
    prompt_tokens: _Count = None
    completion_tokens: _Count = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    model: _Text = None
    usage: Annotated[_Usage | None, WrapValidator(_none_if_invalid)] = None
