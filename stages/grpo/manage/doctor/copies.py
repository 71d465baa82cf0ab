"""copies: whether the store of `artifacts.mirror` can be written, on conditions that two commands need."""

from grpo.artifacts import ActiveRun
from grpo.manage.doctor.report import Report

_PATIENCE_S = 5.0


def check_mirror(run: ActiveRun, report: Report, writes: bool) -> None:
    """Write a key of its own twice, on the condition that it is not there; it goes again.

    writes: else it is only read.
    """
    address = run.config.artifacts.mirror
    if address is None:
        return
    with report.check("mirror", address, "an S3 bucket with conditional writes"):
        from grpo.artifacts.lease import new_epoch
        from grpo.mirror.store import Store, check_conditions

        store, key = Store(address, _PATIENCE_S), f"grpo-doctor-{new_epoch()}"
        if not writes:
            next(store.listing(run.path.name), None)  # says whether the bucket is there
            return
        store.create(key, b"")
        try:
            check_conditions(store, key, b"")
        finally:
            store.delete(key)
