"""config.section: what every section of pipeline.yaml is made of."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # tables count in int32


class Section(BaseModel):
    """A section of pipeline.yaml: strict types, no unknown keys, no nan or inf, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, if they survive being written as JSON: they become part of a fingerprint."""
    try:
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError("may hold text, finite numbers, true, false, null, lists and mappings by text")
    return values
