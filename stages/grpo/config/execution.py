"""config.execution: the execution section of pipeline.yaml."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.section import NonEmpty, Section, must

_DRIVER = (
    "ray:// is a driver outside of the cluster, whose files it cannot read; run the command in the cluster"
)


_SHARED = (
    "engine and learner take turns on a GPU in one process alone, without `execution`; apart is right here"
)


class EnginesConfig(Section):
    """Engines that sample, each in a process of its own, a shard at a time."""

    count: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many, 1 to 1,024. Each holds a policy of its own, and uses as many threads as this process."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """Of each, 0 to 64: what engine_options make it use (tensor_parallel_size times pipeline_parallel_size).
    More than 0 needs `backend: ray`."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 3600.0
    """Seconds, at most 1e6, in which an engine has sampled a shard, the first one with its own opening; else
    it is killed, and another tries."""


class ScorersConfig(Section):
    """Processes that score by functions and reward models, a shard of one reward at a time."""

    count: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many, 1 to 1,024: so many that call functions, each in score.workers processes of its own, and as
    many that hold reward models, each all of them, and use as many threads as this process."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """Of each that holds reward models: 0 or 1, which needs `backend: ray`. Functions take none."""


class LearnerConfig(Section):
    """Processes that train one policy together, each of which holds a part of it."""

    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many, 1 to 1,024: this one is the first and leads, the others it starts. 1: this one alone."""
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of all weights, 1 to 1,024, which divides `processes`: those of a node share one out, say. 1: all share
    one out. More of them send less between nodes, and take more memory."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """Of each, from a Ray cluster: 1 where this process has one too, which is not the cluster's to give. With
    `backend: local` each process takes one of this machine's, where it has any."""

    @model_validator(mode="after")
    def _divides(self) -> "LearnerConfig":
        if self.processes % self.replicas:
            divisors = [count for count in range(1, self.processes + 1) if self.processes % count == 0]
            raise ValueError(
                f"replicas: {self.replicas}: {self.processes} processes share out as many; right are"
                f" {', '.join(map(str, divisors))}"
            )
        return self


class ExecutionConfig(Section):
    """Where work runs. In no stage's fingerprint: it changes no result."""

    backend: Literal["local", "ray"] = "local"
    """`local`: processes of this machine. `ray`: actors of a Ray cluster; `pip install 'grpo-stages[ray]'`
    brings it."""
    address: Annotated[NonEmpty, must(lambda address: not address.startswith("ray://"), _DRIVER)] = "auto"
    """Of the Ray cluster's head, host:port; `auto`: the cluster that this machine is in; `local`: one of this
    process alone."""
    engines: EnginesConfig | None = None
    """What samples; null: this process. Left out, it is one engine, and null where scorers or a learner are
    given."""
    scorers: ScorersConfig | None = None
    """What scores by functions and reward models; null: this process, and its score.workers processes."""
    learner: LearnerConfig | None = None
    """What trains; null: this process, or those of torchrun."""
    weights: Literal["disk", "memory"] = "disk"
    """How engines get a policy that the learner has in memory. `disk`: as files, in memory where all is one
    machine. `memory`: from GPU to GPU by vLLM's own transfer (NCCL), for engines with `gpus`."""
    placement: Annotated[
        Literal["apart", "shared"], must(lambda placement: placement == "apart", _SHARED)
    ] = "apart"
    """Which GPUs: `apart`: engines and learner have some each. `shared`, the same ones in turns, is refused:
    one process does that, without `execution`."""

    @model_validator(mode="before")
    @classmethod
    def _is_for_something(cls, data: Any) -> Any:
        is_given = not isinstance(data, dict) or {"engines", "scorers", "learner"} & data.keys()
        return data if is_given else {**data, "engines": {}}

    @property
    def processes(self) -> int:
        """That train together, this one among them."""
        return 1 if self.learner is None else self.learner.processes

    @property
    def replicas(self) -> int:
        """Of the weights, among these processes."""
        return 1 if self.learner is None else self.learner.replicas

    @model_validator(mode="after")
    def _is_rays(self) -> "ExecutionConfig":
        if self.address != "auto" and self.backend == "local":
            raise ValueError(f"address: {self.address}: of a Ray cluster; set backend: ray, or leave it out")
        if self.weights == "memory" and self.engines is None:
            raise ValueError(
                "weights: memory: is for engines in other processes; this one has the weights already"
            )
        if self.engines is not None and self.engines.gpus and self.backend == "local":
            raise ValueError("engines.gpus: engines on GPUs are for `backend: ray`; 0 is right with local")
        if self.scorers is not None and self.scorers.gpus and self.backend == "local":
            raise ValueError(
                "scorers.gpus: reward models on GPUs are for `backend: ray`; 0 is right with local"
            )
        if self.learner is not None and self.learner.gpus and self.backend == "local":
            raise ValueError(
                "learner.gpus: says what Ray gives each; with local each takes one of this machine's, where"
                " it has any, and 0 is right"
            )
        return self
