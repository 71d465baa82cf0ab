"""shared: what two machines see of one file system, by two commands that meet in a folder of it.

Each check is two functions, for either side: first all is exchanged, then it is judged by the one that leads,
so that a check that fails leaves the other side in step.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from grpo.artifacts import ActiveRun, files
from grpo.artifacts.lease import LAPSE_S
from grpo.artifacts.lock import kernel_lock
from grpo.errors import LockedError, ResourceError
from grpo.manage.doctor.meeting import HOW, PATIENCE_S, Meeting
from grpo.manage.doctor.report import Check, Report

FOLDER = ".doctor-shared"
_NUM_WORDS, _NUM_NAMES, _NUM_VERSIONS = 5, 40, 200
_REPEATED = 8192  # eight digits so often: 64 KiB, which no disk writes at once
_SEEN_S = LAPSE_S / 3  # a renewed lease has to be seen well before it would lapse
_SYNCED_BYTES = 2**22


def examine_shared(run: ActiveRun) -> tuple[Report, bool]:
    """Look at the file system of the runs together with another command; and whether this one leads.

    Raises ResourceError (exit 7) where no other one comes, or it ends before all is looked at.
    """
    report, meeting = Report(run.name, run.root), Meeting(run.root / FOLDER)
    if not meeting.is_first:
        for _, _, _, second in _CHECKS:
            second(meeting)
        report.checks = [Check(**each) for each in meeting.hear("end")["checks"]]
        meeting.tell("bye")
        return report, False
    try:
        with report.check("machines", meeting.machines, "two") as check:
            if meeting.is_alone:
                check.warn(f"both are this machine, which shows nothing of what others see; {HOW}")
        for name, needed, first, _ in _CHECKS:
            with report.check(name, "", needed) as check:
                first(meeting, check)
        meeting.tell("end", checks=[asdict(check) for check in report.checks])
        with suppress(ResourceError):
            meeting.hear("bye")
    finally:
        meeting.close()
    return report, True


def _names_first(meeting: Meeting, check: Check) -> None:
    seconds = []
    for number in range(_NUM_WORDS):
        started = time.monotonic()
        meeting.tell(f"ping-{number}")
        meeting.hear(f"pong-{number}")
        seconds.append(time.monotonic() - started)
    check.found = f"seen and answered in {max(seconds) * 1000:.0f} ms"


def _names_second(meeting: Meeting) -> None:
    for number in range(_NUM_WORDS):
        meeting.hear(f"ping-{number}")
        meeting.tell(f"pong-{number}")


@contextmanager
def _locked(meeting: Meeting) -> Iterator[str]:
    """Hold a lock in a `with` block, if it can be had: `held`, `refused`, or what the error says."""
    folder = meeting.place("lock")
    files.make_folder(folder)
    with ExitStack() as stack:
        outcome = "held"
        try:
            stack.enter_context(kernel_lock(folder))
        except LockedError:
            outcome = "refused"
        except ResourceError as error:
            outcome = str(error)
        yield outcome


def _lock_first(meeting: Meeting, check: Check) -> None:
    with _locked(meeting) as own:
        meeting.tell("locked")
        tried = meeting.hear("tried")["outcome"]
    meeting.tell("unlocked")
    later = meeting.hear("later")["outcome"]
    for outcome in (own, tried, later):
        if outcome not in ("held", "refused"):
            raise ResourceError(outcome)
    if "refused" in (own, later):
        raise ResourceError(f"{meeting.folder}: a lock that nobody holds is refused")
    check.found = "refused to the second one, until it is free"
    if tried == "held":
        check.found = "held by both at once"
        check.warn(
            "the file system does not pass locks on: a second command on another machine is kept out by the"
            " lease in the run's folder alone, within 12 seconds; mount it with locks for an answer at once"
        )


def _lock_second(meeting: Meeting) -> None:
    for word, answer in (("locked", "tried"), ("unlocked", "later")):
        meeting.hear(word)
        with _locked(meeting) as outcome:
            meeting.tell(answer, outcome=outcome)


def _version(number: int) -> bytes:
    return f"{number:08d}".encode() * _REPEATED


def _rename_first(meeting: Meeting, check: Check) -> None:
    path = meeting.place("value")
    files.write_file(path, _version(0))
    meeting.tell("value")
    meeting.hear("reading")
    for number in range(1, _NUM_VERSIONS):
        files.replace_unsynced(path, _version(number))
    meeting.tell("replaced")
    found = meeting.hear("read")
    reads = f"of {found['reads']:,} reads meanwhile"
    if found["torn"] or found["gone"]:
        torn = f"{found['torn']} {reads} found parts of two versions, {found['gone']} none"
        raise ResourceError(f"{path}: {torn}: a rename here is no single step, and a run could be read torn")
    if found["seen_s"] > _SEEN_S:
        late = f"the last version was seen after {found['seen_s']:.0f} s, more than {_SEEN_S:.0f}"
        raise ResourceError(f"{path}: {late}; mount it with `actimeo=10` or less")
    check.found = f"whole in all {reads}, the last seen after {found['seen_s'] * 1000:.0f} ms"


def _rename_second(meeting: Meeting) -> None:
    path, last = meeting.place("value"), _version(_NUM_VERSIONS - 1)
    meeting.hear("value")
    meeting.tell("reading")
    counts = {"reads": 0, "torn": 0, "gone": 0}
    until = time.monotonic() + PATIENCE_S
    while not meeting.has_said("replaced") and meeting.folder.exists() and time.monotonic() < until:
        _read(path, counts)
    meeting.hear("replaced")
    started = time.monotonic()
    while _read(path, counts) != last and time.monotonic() - started < PATIENCE_S / 2:
        time.sleep(0.01)
    meeting.tell("read", **counts, seen_s=time.monotonic() - started)


def _read(path: Path, counts: dict[str, int]) -> bytes:
    counts["reads"] += 1
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        counts["gone"] += 1
        return b""
    counts["torn"] += content != content[:8] * _REPEATED
    return content


def _created(meeting: Meeting) -> list[int]:
    """Of names that both try to make at the same time, those that this one made."""
    meeting.tell("making")
    meeting.hear("making")
    return [
        number for number in range(_NUM_NAMES) if files.create_file(meeting.place(f"name-{number}"), b"x")
    ]


def _create_first(meeting: Meeting, check: Check) -> None:
    own = _created(meeting)
    other = meeting.hear("made")["names"]
    if sorted([*own, *other]) != [*range(_NUM_NAMES)]:
        both = len({*own} & {*other})
        raise ResourceError(
            f"{meeting.folder}: {both} of {_NUM_NAMES} names were made by both machines, each as the only one"
        )
    check.found = f"{len(own)} and {len(other)} of {_NUM_NAMES}, none twice"


def _create_second(meeting: Meeting) -> None:
    meeting.tell("made", names=_created(meeting))


def _link_first(meeting: Meeting, check: Check) -> None:
    path, other = meeting.place("one"), meeting.place("other")
    files.write_file(path, b"content")
    why = ""
    try:
        files.link_file(path, other)
    except ResourceError as error:
        why = str(error)
    meeting.tell("linked")
    seen = meeting.hear("names")["same"]
    check.found = "both names are one file" if seen else "none"
    if not seen:
        why = why or f"{other}: is not the same file for the other machine"
        check.warn(f"{why}; `grpo fork`, `--only-failed` and `dynamic_sampling` need hard links")


def _link_second(meeting: Meeting) -> None:
    meeting.hear("linked")
    path, other = meeting.place("one"), meeting.place("other")
    meeting.tell("names", same=other.exists() and other.samefile(path))


def _sync_first(meeting: Meeting, check: Check) -> None:
    path, content = meeting.place("synced"), os.urandom(_SYNCED_BYTES)
    started, why = time.monotonic(), ""
    try:
        files.write_file(path, content)
        files.sync_folder(path.parent)
    except ResourceError as error:
        why = str(error)
    seconds = time.monotonic() - started
    meeting.tell("synced", sha256=sha256(content).hexdigest())
    whole = meeting.hear("hashed")["same"]
    if why or not whole:
        raise ResourceError(why or f"{path}: is not, for the other machine, what was written and synced")
    check.found = f"4 MiB in {seconds * 1000:.0f} ms, and whole for the other one"


def _sync_second(meeting: Meeting) -> None:
    expected, path = meeting.hear("synced")["sha256"], meeting.place("synced")
    meeting.tell("hashed", same=path.exists() and files.sha256_of(path) == expected)


_CHECKS: tuple[tuple[str, str, Callable[[Meeting, Check], None], Callable[[Meeting], None]], ...] = (
    ("names", "a name that one makes is seen by the other", _names_first, _names_second),
    ("lock", "one of two has it", _lock_first, _lock_second),
    ("rename", "a file is replaced in one step", _rename_first, _rename_second),
    ("create", "one of two makes a name", _create_first, _create_second),
    ("hard link", "two names of one file", _link_first, _link_second),
    ("fsync", "what is synced is on disk", _sync_first, _sync_second),
)
