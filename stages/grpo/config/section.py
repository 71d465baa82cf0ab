"""config.section: what every section of pipeline.yaml is made of."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.main import IncEx
from pydantic_core import InitErrorDetails


def must(holds: Callable[[Any], object], problem: str) -> AfterValidator:
    """A check for a field's annotation: ValueError(problem) for a value of which it does not hold."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(problem)
        return value

    return AfterValidator(check)


def wrong_at(place: tuple[str, ...], kind: str, found: Any, **context: Any) -> ValidationError:
    """What pydantic itself would raise for the value `found` at a `place` within the section."""
    error = InitErrorDetails(type=kind, loc=place, input=found, ctx=context)
    return ValidationError.from_exception_data("configuration", [error])


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
ADDED = "added"
"""Mark of a field that came later than the runs that are there: `Annotated[list[str], ADDED] = Field([])`.
At its default it changes no result, so fingerprints leave it out, and those of older runs still hold."""


class Section(BaseModel):
    """A section of pipeline.yaml: strict types, no unknown keys, no nan or inf, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def recorded(self, exclude: IncEx | None = None) -> dict[str, Any]:
        """The values as part of a fingerprint: without `exclude`, and added fields at their default."""
        return self._without_defaults_added(self.model_dump(exclude=exclude))

    def _without_defaults_added(self, values: dict[str, Any]) -> dict[str, Any]:
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if ADDED in info.metadata and value == info.get_default(call_default_factory=True):
                values.pop(name, None)
            elif isinstance(value, Section) and name in values:
                values[name] = value._without_defaults_added(values[name])
        return values
