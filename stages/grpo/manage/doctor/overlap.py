"""overlap: whether sampling ahead would gain time, by what the run's iterations have taken."""

from grpo.artifacts import ActiveRun, lacks_run_json
from grpo.generate.engines.tail import TAIL
from grpo.inspect.metrics import times_of
from grpo.manage.doctor.report import Report

LATEST = 20  # iterations that are looked at
WORTH_IT = 0.15  # of an iteration
_IDLE = (TAIL, "load")  # parts of generate in which most of the engine has nothing to do; load: new weights


def check_overlap(run: ActiveRun, report: Report) -> None:
    """Nothing to say of a run without history, or that samples ahead."""
    if run.config.generate.policy_lag or not run.path.exists() or lacks_run_json(run.path):
        return
    iterations = [n for n in run.iterations() if run.timings("update", n)][-LATEST:]
    parts = [run.timings("rollouts", number) for number in iterations]
    idle = sum(of.get(name, 0.0) for of in parts for name in _IDLE)
    whole = sum(times_of(run, number)["seconds"] for number in iterations)
    if not whole or idle / whole <= WORTH_IT:
        return
    found = f"in {idle / whole:.0%} of an iteration most of the engine waits"
    with report.check("sampling ahead", found, f"{WORTH_IT:.0%} or less") as check:
        other = " instead of dynamic_sampling" if run.config.generate.dynamic_sampling else ""
        check.note = (
            f"the tail of sampling and new weights for it took {idle:.1f} of {whole:.1f} s;"
            f" generate.policy_lag: 1 with execution.engines{other} samples the next iteration meanwhile"
            " (docs/scaling.md)"
        )
