"""Who may write a mirror, by clocks that a test turns."""

import json
from collections.abc import Callable

import pytest
from tests.mirror.s3 import Bucket, Server

from grpo.artifacts.lease import LAPSE_S, STOP_S, Clock, Holder, Lease
from grpo.errors import GrpoError, LockedError, ResourceError, UsageError
from grpo.mirror.lease import holder_of, lease_of
from grpo.mirror.store import Store

KEY = "runs/tiny/lease.json"


class Time:
    """A clock that goes on where somebody waits, by as much; `meanwhile` happens then."""

    def __init__(self) -> None:
        self.now, self.waited = 1000.0, 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def clock(self) -> Clock:
        return Clock(lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds
        self.meanwhile()


def lease(bucket: Bucket, epoch: str, time: Time, patience_s: float = 20) -> Lease:
    return lease_of(Store(f"s3://{bucket.name}/runs", patience_s), "tiny", epoch, time.clock())


def take(one: Lease, *known: str) -> str | None:
    return one.take(among(*known), lambda line: None, lambda: None)


def among(*known: str) -> Callable[[Holder], bool]:
    return lambda holder: holder.epoch in known


def test_the_first_holder_is_noted_and_releases(bucket: Bucket) -> None:
    time = Time()
    one = lease(bucket, "a", time)
    assert take(one) is None
    held = json.loads(bucket.read(KEY))
    assert (held["epoch"], held["beat"], held["released"]) == ("a", 0, False)
    assert holder_of(Store(f"s3://{bucket.name}/runs"), "tiny") == one.held
    one.renew()
    assert json.loads(bucket.read(KEY))["beat"] == 1
    one.release()
    assert holder_of(Store(f"s3://{bucket.name}/runs"), "tiny") is None
    assert take(lease(bucket, "b", time)) == "a"
    assert time.waited == 0  # it was free


def test_a_holder_that_renews_keeps_it_and_is_named(bucket: Bucket) -> None:
    time = Time()
    one, other = lease(bucket, "a", time), lease(bucket, "b", time)
    take(one)
    time.meanwhile = one.renew
    said: list[str] = []
    with pytest.raises(LockedError) as raised:
        other.take(among(), said.append, lambda: None)
    who = f"pid {one.held.pid} on {one.held.host} since {one.held.since}"
    place = f"s3://{bucket.name}/runs/tiny/lease.json"
    assert str(raised.value) == f"{place}: in use by {who}; wait for it, or stop it"
    assert said == [f"mirror: in use by {who}; taken over if it is not renewed for 60 s"]
    assert time.waited <= LAPSE_S / 10
    one.check()  # it has it still


def test_one_that_is_not_renewed_is_taken_over_and_the_zombie_refused(bucket: Bucket) -> None:
    time = Time()
    zombie, other = lease(bucket, "a", time), lease(bucket, "b", time)
    take(zombie)
    assert take(other) == "a"
    assert time.waited >= LAPSE_S
    for act in (zombie.renew, zombie.check):
        with pytest.raises(GrpoError) as raised:
            act()
        # By its own clock, or by what is there.
        assert "not renewed for 40 s" in str(raised.value) or "taken over by pid" in str(raised.value)
    zombie.release()  # has no effect
    other.check()


def test_a_zombie_whose_clock_stood_still_is_refused_by_the_etag(bucket: Bucket) -> None:
    frozen, time = Time(), Time()
    zombie, other = lease(bucket, "a", frozen), lease(bucket, "b", time)
    take(zombie)
    take(other)
    for act in (zombie.renew, zombie.check):
        with pytest.raises(LockedError, match=r"taken over by pid \d+ on .*; mirroring stopped"):
            act()
    other.check()


def test_the_holder_stops_after_40_s_without_a_renewal(bucket: Bucket, server: Server) -> None:
    time = Time()
    one = lease(bucket, "a", time, patience_s=2)
    take(one)
    server.before = lambda method, key: 503
    with pytest.raises(ResourceError, match="does not answer"):
        one.renew()
    time.now += STOP_S - 1
    one.check_renewed()
    time.now += 1
    with pytest.raises(ResourceError, match=r"not renewed for 40 s \(no network\); mirroring stopped"):
        one.check_renewed("no network")
    assert STOP_S < LAPSE_S  # nobody else has it before


def test_its_own_epoch_is_over_where_the_run_is_locked_here(bucket: Bucket) -> None:
    time = Time()
    take(lease(bucket, "killed", time))
    assert take(lease(bucket, "next", time), "killed") == "killed"
    assert time.waited == 0


def test_of_two_that_wait_one_has_it(bucket: Bucket) -> None:
    time, quicker = Time(), Time()
    take(lease(bucket, "dead", time))
    other = lease(bucket, "quick", quicker)

    def just_before() -> None:
        if time.waited >= LAPSE_S:
            take(other)

    time.meanwhile = just_before
    with pytest.raises(LockedError, match="in use by pid"):
        take(lease(bucket, "slow", time))
    other.check()


@pytest.mark.parametrize("act", ["renew", "take"])
def test_an_answer_that_was_lost_is_no_loss(bucket: Bucket, server: Server, act: str) -> None:
    # The store has written, its answer did not come, and the library asks again: then the condition fails.
    time = Time()
    one = lease(bucket, "a", time)
    lost: list[str] = []

    def answer(method: str, key: str) -> int | None:
        is_first = method == "PUT" and not lost
        lost.extend([key] * is_first)
        return 503 if is_first else None

    if act == "renew":
        take(one)
    if act == "take":
        before = lease(bucket, "before", time)
        take(before)
        before.release()
    server.after = answer
    one.renew() if act == "renew" else take(one)
    one.check()
    assert len(lost) == 1


@pytest.mark.parametrize(("header", "name"), [("If-None-Match", "If-None-Match"), ("If-Match", "If-Match")])
def test_a_store_without_conditions_is_refused(
    bucket: Bucket, server: Server, header: str, name: str
) -> None:
    server.ignores = {header}
    with pytest.raises(UsageError, match=f"the store ignores {name}, so two commands could write one mirror"):
        take(lease(bucket, "a", Time()))


def test_waiting_ends_where_somebody_asks_for_it(bucket: Bucket) -> None:
    time = Time()
    take(lease(bucket, "a", time))

    def stop() -> None:
        if time.waited:
            raise ResourceError("asked to stop")

    with pytest.raises(ResourceError, match="asked to stop"):
        lease(bucket, "b", time).take(among(), lambda line: None, stop)
    assert time.waited < LAPSE_S
