"""places: where work runs, as `execution` has it: what cannot be, and what a cluster has room for."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from grpo.artifacts import ActiveRun
from grpo.config import Config, ExecutionConfig
from grpo.execute import require_ray
from grpo.generate.engine_pool import check_engines
from grpo.generate.engines.choice import choose_engine
from grpo.manage.doctor.report import Check, Report
from grpo.models.loading import best_device
from grpo.score.scorers import check_place
from grpo.update.world import check_learner


class Wanted(NamedTuple):
    """Workers of a kind. name: of the check; key: of their number, which counts this process as `own`.

    require: raises for what they cannot do.
    """

    name: str
    kind: str
    key: str
    number: int
    cpus: int
    gpus: int = 0
    own: int = 0
    require: Callable[[], None] = lambda: None

    @property
    def needed(self) -> str:
        """Of a node, by each."""
        return f"{self.cpus} cores{f' and {self.gpus} GPUs' if self.gpus else ''} each"


def check_execution(run: ActiveRun, report: Report, room: bool) -> None:
    """Nothing where all is in this process. room: a Ray cluster is asked what it has, too."""
    execution = run.config.execution
    if execution is None:
        return
    nodes: list[Any] | None = None
    for index, wanted in enumerate(_wanted(run.config, execution)):
        found = f"{wanted.number} {wanted.kind}, {execution.backend}"
        with report.check(wanted.name, found, wanted.needed) as check:
            wanted.require()
            nodes = nodes if index else _nodes_of(execution, room)
            _place(check, nodes, wanted)


def _wanted(config: Config, execution: ExecutionConfig) -> Iterator[Wanted]:
    """In the order in which they work; scorers of reward models open those before engines come, too."""
    engines, scorers, threads = execution.engines, execution.scorers, torch.get_num_threads()
    engine = choose_engine(config.generate.engine)[0]
    require, beside = partial(check_engines, config, engine, best_device()), ""
    if engines is not None:
        key = "execution.engines.count"
        yield Wanted("execution", "engines", key, engines.count, threads, engines.gpus, require=require)
        beside = " beside engines"
    if scorers is not None:
        key, rewards = "execution.scorers.count", config.score.rewards
        if any(reward.function is not None for reward in rewards):
            yield Wanted("execution.scorers", f"scorers{beside}", key, scorers.count, config.score.workers)
            beside = " beside the others"
        if any(reward.model is not None for reward in rewards):
            name, kind = "execution.scorers, models", f"scorers of reward models{beside}"
            place = partial(check_place, config)
            yield Wanted(name, kind, key, scorers.count, threads, scorers.gpus, require=place)
            beside = " beside the others"
    if execution.learner is not None and execution.processes > 1:

        def require_learner() -> None:
            check_learner(config)
            require()

        kind, key = f"processes of the learner{beside}", "execution.learner.processes"
        others, gpus = execution.processes - 1, execution.learner.gpus
        yield Wanted("execution.learner", kind, key, others, threads, gpus, 1, require_learner)


def _nodes_of(execution: ExecutionConfig, room: bool) -> list[Any] | None:
    """Of a cluster that is to be asked; None: it is not."""
    if execution.backend == "local":
        return None
    require_ray()
    from grpo.execute.ray_cluster import nodes_of

    return [*nodes_of(execution.address)] if room else None


def _place(check: Check, nodes: list[Any] | None, wanted: Wanted) -> None:
    """Say how many have room, and take it from `nodes`."""
    if nodes is None:
        return
    has_cpus, has_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    check.found += f" on {len(nodes)} nodes: {has_cpus} cores, {has_gpus} GPUs"
    placed, cpus, gpus = 0, wanted.cpus, wanted.gpus
    for index, node in enumerate(nodes):
        here = min(node.room_for(cpus, gpus), wanted.number - placed)
        nodes[index] = node._replace(cpus=node.cpus - here * cpus, gpus=node.gpus - here * gpus)
        placed += here
    if placed < wanted.number:
        then = "waits for the rest, and ends (exit 7) without" if wanted.own else "uses those"
        check.warn(
            f"there is room for {placed} of {wanted.number} {wanted.kind}; a run {then}, or set"
            f" {wanted.key}: {max(placed + wanted.own, 1)}"
        )
