"""places: where work runs, as `execution` has it: what cannot be, and what a cluster has room for."""

import torch

from grpo.artifacts import ActiveRun
from grpo.execute import require_ray
from grpo.generate.engine_pool import check_engines
from grpo.generate.engines.choice import choose_engine
from grpo.manage.doctor.report import Report
from grpo.models.loading import best_device


def check_execution(run: ActiveRun, report: Report, room: bool) -> None:
    """Nothing where all is in this process. room: a Ray cluster is asked what it has, too."""
    execution = run.config.execution
    if execution is None:
        return
    engines, threads = execution.engines, torch.get_num_threads()
    found = f"{engines.count} engines, {execution.backend}"
    with report.check("execution", found, f"{threads} cores each") as check:
        check_engines(run.config, choose_engine(run.config.generate.engine)[0], best_device())
        if execution.backend == "local":
            return
        rays = require_ray()
        if not room:
            return
        nodes = rays.nodes_of(execution.address)
        cores, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        check.found += f" on {len(nodes)} nodes: {cores} cores, {gpus} GPUs"
        fitting = sum(node.room_for(threads, engines.gpus) for node in nodes)
        if fitting < engines.count:
            check.warn(
                f"there is room for {fitting} of {engines.count} engines; a run goes on with those, or set"
                f" execution.engines.count: {max(fitting, 1)}"
            )
