"""Manifests that somebody sent: each field of each stage's manifest with values that nothing wrote.

They are sealed, as anybody can. Every command ends in bounded time, with one line and an exit code that says
what is wrong, and `verify` never says that such a run is whole where it cannot be read.
"""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.conftest import Grpo

from grpo.artifacts import MANIFEST, read_manifest, seal
from grpo.errors import CorruptError, InputError

RUN = Path("artifacts/tiny")
OUTPUTS = {
    "prompts": RUN / "prompts",
    "policy": RUN / "policy",
    "eval_prompts": RUN / "eval_prompts",
    **{name: RUN / "iteration=000001" / name for name in ("rollouts", "rewards", "advantages", "update")},
    "evaluation": RUN / "iteration=000001/evaluation",
}
HOSTILE: list[Any] = [
    {},
    [],
    "x",
    None,
    -1,
    10**12,
    10**400,
    True,
    "../../x\x1b[31m",
    [1],
    {"\x1b[31mx": {"y": 1}},
    "9" * 5000,
]
ABSENT = object()
# References: of what no iteration has, or of another than can have been read.
REFERENCES = (
    "policy@-1",
    f"policy@{10**23}",
    "policy@999999999",
    "../../x@1",
    "rollouts@a",
    "prompts\x1b[31m",
    "policy",
)
COMMANDS = (
    ("verify",),
    ("status",),
    ("report", "--out", "r.html"),
    ("gc", "--dry-run"),
    ("run",),
    ("show", "--no-pager"),
)
SECONDS = 20


@contextmanager
def limited() -> Iterator[None]:
    """An alarm after SECONDS, and no more than 6 GiB of memory."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fields_of(value: Any) -> Iterator[tuple[Any, ...]]:
    """The ways to every value of a document: of a list, to the first item."""
    children = (
        value.items()
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield (key,)
        for rest in fields_of(child):
            yield (key, *rest)


def changed(document: Any, way: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there, or none."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    inner: Any = copy
    for key in way[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return copy


def problem(grpo: Grpo, command: tuple[str, ...]) -> str:
    """What is wrong with how a command ends; empty: nothing."""
    try:
        with limited():
            code, out, err = grpo(*command)
    except BaseException as error:  # noqa: BLE001 - a traceback is what is looked for
        return f"{type(error).__name__}: {error}"
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if "\x1b" in out + err:
        return "a raw escape character"
    # 4: a newer version's, or stale; verify says of what it cannot read that it is damaged.
    if code not in ({0, 4, 6} if command[0] == "verify" else {0, 2, 3, 4, 6}):
        return f"exit {code}: {err}"
    return (
        ""
        if code == 0 or len(lines) == 1 or (command[0] == "verify" and "damaged" in out)
        else f"{code}: {err}{out}"
    )


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_field_with_a_hostile_value(measured: Path, grpo: Grpo, output: str) -> None:
    path, refused, passed, wrong = OUTPUTS[output] / MANIFEST, count(), count(), []
    document = json.loads(path.read_text())
    del document["sha256"]
    for way in fields_of(document):
        for value in (*HOSTILE, ABSENT):
            path.write_bytes(seal(changed(document, way, value)))
            try:
                read_manifest(path.parent)
            except (CorruptError, InputError):  # as every command says it: some of them are asked
                turn, every = next(refused), 80
            else:
                turn, every = next(passed), 6
            if turn % every == 0 and (found := problem(grpo, COMMANDS[turn // every % len(COMMANDS)])):
                place = ".".join(map(str, way))
                wrong.append(
                    f"{COMMANDS[turn // every % len(COMMANDS)]}: {place} = {str(value)[:40]!r}: {found[:300]}"
                )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("output", ["rollouts", "update"])
def test_a_reference_that_nothing_can_have_read(
    measured: Path, grpo: Grpo, output: str, reference: str
) -> None:
    path = OUTPUTS[output] / MANIFEST
    document = json.loads(path.read_text())
    del document["sha256"]
    document["inputs"][reference] = "x"
    path.write_bytes(seal(document))
    for command in COMMANDS[:2]:
        assert problem(grpo, command) == ""
    with limited():
        assert grpo("verify")[0] == 6


def test_an_iteration_far_behind_the_others(measured: Path, grpo: Grpo) -> None:
    """Its manifests say that they are of it: every iteration before would be looked for."""
    far = 999_999_999
    for name in ("rollouts", "update"):
        folder = RUN / f"iteration={far:06d}" / name
        shutil.copytree(OUTPUTS[name], folder)
        document = json.loads((folder / MANIFEST).read_text())
        del document["sha256"]
        document["iteration"], document["inputs"] = far, {f"policy@{far}": "x"}
        document["config"].setdefault("update", {})["replay_iterations"] = 2**31 - 1
        (folder / MANIFEST).write_bytes(seal(document))
    for command in COMMANDS:
        assert problem(grpo, command) == ""
    with limited():
        code, out, _ = grpo("verify")
    assert (code, "it is of another run" in out) == (6, True)


@pytest.mark.parametrize("seconds", [10**400, -1, "x", {}, [1]])
def test_timings(measured: Path, grpo: Grpo, seconds: Any) -> None:
    (OUTPUTS["rollouts"] / "timings.json").write_text(json.dumps({"seconds": {"\x1b[31m": seconds}}))
    for command in COMMANDS[:3]:
        assert problem(grpo, command) == ""
    assert grpo("verify")[0] == 6


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900])
@pytest.mark.parametrize("part", ["config", "summary", "labels"])
def test_nested_values(measured: Path, grpo: Grpo, part: str, value: str) -> None:
    path = OUTPUTS["advantages"] / MANIFEST
    document = json.loads(path.read_text())
    del document["sha256"]
    (document["files"][0]["labels"] if part == "labels" else document[part])["x"] = json.loads(value)
    path.write_bytes(seal(document))
    for command in COMMANDS[:2]:
        assert problem(grpo, command) == ""
    assert grpo("verify")[0] == 6


@pytest.mark.parametrize("name", ["run.json", ".from.json"])
def test_notes_of_a_run(measured: Path, grpo: Grpo, name: str) -> None:
    path = RUN / name
    document: dict[str, Any] = {"from": 0}
    if path.exists():
        document = json.loads(path.read_text())
        del document["sha256"]
    for key in document:
        for value in HOSTILE:
            path.write_bytes(seal({**document, key: value}))
            for command in (("verify",), ("status", "tiny", "-c", "none")):
                assert problem(grpo, command) == "", (key, command)
