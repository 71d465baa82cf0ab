"""config.lora: update.lora of pipeline.yaml."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from grpo.config.section import ADDED, NonEmpty, Section

# Far above what anyone means by a bound of a ratio or a weight in the loss, and far below where float32 ends
# (3e38): beyond that a bound cannot be compared, and a weight times 0 is not a number.
LARGEST = 1e6
Targets = Annotated[
    Annotated[list[NonEmpty], Field(min_length=1)] | None,
    BeforeValidator(lambda given: None if given == "all-linear" else given),
]


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of the weights (arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=2**14)]
    """Rank of an adapter's two matrices, 1 to 16,384; above a weight's smaller side more adds nothing."""
    alpha: Annotated[float, Field(gt=0, le=LARGEST)]
    """An adapter's output is scaled by alpha / rank; > 0, at most 1e6."""
    rslora: Annotated[bool, ADDED] = False
    """true: it is scaled by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    targets: Targets = None
    """Names of the modules that get an adapter, such as q_proj; null or all-linear: every linear layer but
    the output's."""
    modules_to_save: Annotated[list[NonEmpty], ADDED] = Field([])
    """Names of modules that train whole beside the adapters, such as lm_head; the reference is then a model
    of its own."""
