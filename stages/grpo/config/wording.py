"""config.wording: what pydantic found wrong with a value -> what would be right, in our words."""

from typing import Any

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "string_unicode": "valid Unicode text",
    "list": "a list",
    "dict": "a mapping (key: value)",
    "none": "null",
    "model": "a section with keys",
}
_LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
_NAME = "at most 64 letters, digits, . _ -, a letter or digit first"


def expected(problem: Any) -> str | None:
    """What the value of one of ValidationError.errors() must be; None where the text of a check says it."""
    kind, context = problem["type"], problem.get("ctx", {})
    name = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if name in _KINDS:
        return _KINDS[name]
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if limit := next((key for key in _LIMITS if key in context), None):
        return f"{_LIMITS[limit]} {context[limit]:.15g}"
    if kind == "finite_number":
        return "a finite number"
    if kind in ("too_short", "too_long"):
        most = kind == "too_long"
        count = context["max_length" if most else "min_length"]
        return f"{'at most' if most else 'at least'} {count} item{'' if count == 1 else 's'}"
    if kind == "string_too_short":
        return "text that is not empty"
    return _NAME if kind == "string_pattern_mismatch" else None


def found(problem: Any) -> Any:
    """The value that was found; of a list of the wrong length that length."""
    value = problem["input"]
    return len(value) if problem["type"] in ("too_short", "too_long") else value
