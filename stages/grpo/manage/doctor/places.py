"""places: where work runs, as `execution` has it: what cannot be, and what a cluster has room for."""

from typing import Any

import torch

from grpo.artifacts import ActiveRun
from grpo.config import ExecutionConfig
from grpo.execute import require_ray
from grpo.generate.engine_pool import check_engines
from grpo.generate.engines.choice import choose_engine
from grpo.manage.doctor.report import Check, Report
from grpo.models.loading import best_device


def check_execution(run: ActiveRun, report: Report, room: bool) -> None:
    """Nothing where all is in this process. room: a Ray cluster is asked what it has, too."""
    execution, workers = run.config.execution, run.config.score.workers
    if execution is None:
        return
    engines, scorers, threads = execution.engines, execution.scorers, torch.get_num_threads()
    nodes: list[Any] | None = None
    if engines is not None:
        found = f"{engines.count} engines, {execution.backend}"
        with report.check("execution", found, f"{threads} cores each") as check:
            check_engines(run.config, choose_engine(run.config.generate.engine)[0], best_device())
            nodes = _nodes_of(execution, room)
            _place(check, nodes, "engines", engines.count, threads, engines.gpus)
    if scorers is not None:
        beside = "" if engines is None else " beside engines"
        found = f"{scorers.count} scorers{beside}, {execution.backend}"
        with report.check("execution.scorers", found, f"{workers} cores each") as check:
            nodes = _nodes_of(execution, room) if engines is None else nodes
            _place(check, nodes, "scorers", scorers.count, workers, 0)


def _nodes_of(execution: ExecutionConfig, room: bool) -> list[Any] | None:
    """Of a cluster that is to be asked; None: it is not."""
    if execution.backend == "local":
        return None
    rays = require_ray()
    return list(rays.nodes_of(execution.address)) if room else None


def _place(check: Check, nodes: list[Any] | None, kind: str, count: int, cpus: int, gpus: int) -> None:
    """Say what of `count` workers has room, and take it from `nodes`."""
    if nodes is None:
        return
    has_cpus, has_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    check.found += f" on {len(nodes)} nodes: {has_cpus} cores, {has_gpus} GPUs"
    placed = 0
    for number, node in enumerate(nodes):
        here = min(node.room_for(cpus, gpus), count - placed)
        nodes[number] = node._replace(cpus=node.cpus - here * cpus, gpus=node.gpus - here * gpus)
        placed += here
    if placed < count:
        check.warn(
            f"there is room for {placed} of {count} {kind}; a run uses those, or set"
            f" execution.{kind}.count: {max(placed, 1)}"
        )
