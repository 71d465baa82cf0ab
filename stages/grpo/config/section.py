"""config.section: what every section of pipeline.yaml is made of."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def must(holds: Callable[[Any], object], problem: str) -> AfterValidator:
    """A check for a field's annotation: ValueError(problem) for a value of which it does not hold."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(problem)
        return value

    return AfterValidator(check)


def _survives_json(values: dict[str, Any]) -> bool:
    """It has to: the values become part of a fingerprint."""
    try:
        return bool(json.loads(json.dumps(values, allow_nan=False)) == values)
    except (TypeError, ValueError):
        return False


_ALLOWED = "may hold text, finite numbers, true, false, null, lists and mappings by text"
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # tables count in int32
Plain = Annotated[dict[str, Any], must(_survives_json, _ALLOWED)]


class Section(BaseModel):
    """A section of pipeline.yaml: strict types, no unknown keys, no nan or inf, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
