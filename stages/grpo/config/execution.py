"""config.execution: the execution section of pipeline.yaml."""

from typing import Annotated

from pydantic import Field

from grpo.config.section import Section


class EnginesConfig(Section):
    """Engines that sample, each in a process of its own, a shard at a time."""

    count: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many, 1 to 1,024. Each holds a policy of its own, and uses as many threads as this process."""


class ExecutionConfig(Section):
    """Where work runs. In no stage's fingerprint: it changes no result."""

    engines: EnginesConfig = EnginesConfig()
