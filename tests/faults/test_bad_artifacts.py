"""What a run holds, damaged by hand: pieces deleted, swapped, cut off, or other things in their place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.faults.refusals import RUN, RUN_ON, Case, check, folder, loop, nothing, write

from grpo.artifacts import seal

TINY = "artifacts/tiny"
ROLLOUTS, REWARDS = (f"{TINY}/iteration=000000/{output}" for output in ("rollouts", "rewards"))
LATER = f"{TINY}/iteration=000001/rollouts"
READ = ("sql", "select * from samples")
AGAIN = ("score", "--iteration", "0", "--force")
RUN_JSON, MANIFEST = f"{TINY}/run.json", f"{ROLLOUTS}/manifest.json"


def link(name: str, target: str) -> Callable[[], object]:
    """A link in place of nothing."""
    return lambda: Path(name).symlink_to(target)


def lock(kind: Callable[[str], Callable[[], object]]) -> Callable[[], object]:
    """Something else in place of the lock of a run that is not begun."""
    return kind(f"{TINY}/.lock")


NEW = [
    Case("artifacts: a file", write("artifacts", "x"), RUN, 7, "artifacts: File exists"),
    Case("artifacts: a link to itself", loop("artifacts"), RUN, 7, "artifacts: File exists"),
    Case("artifacts: a link to nowhere", link("artifacts", "nowhere"), RUN, 7, "artifacts: File exists"),
    Case("artifacts: a file; status", write("artifacts", "x"), ["status"], 2, "artifacts/tiny: no such run"),
    Case("the run: a link to itself", loop(TINY), RUN, 7, "artifacts/tiny: File exists"),
    Case("the lock: a folder", lock(folder), RUN, 7, ".lock: Is a directory"),
    Case(
        "the lock: a link to itself",
        lock(loop),
        RUN,
        6,
        ".lock: is a link to nowhere, not the run's own; remove it",
    ),
    Case(
        "nothing yet: status",
        nothing,
        ["status"],
        2,
        "artifacts/tiny: no such run; no run is there yet; `grpo",
    ),
    Case(
        "nothing yet: sql", nothing, READ, 2, "artifacts/tiny: no such run; no run is there yet; `grpo run`"
    ),
]


@pytest.mark.parametrize("case", NEW, ids=lambda case: case.input)
def test_where_a_run_cannot_begin(project: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


@pytest.mark.parametrize("stage", ["score", "advantage", "update"])
def test_a_stage_whose_input_is_missing(project: Path, grpo: Grpo, stage: str) -> None:
    assert grpo("advantage")[0] == 0  # begins the run; there is nothing for it to do
    message = f"{ROLLOUTS}: missing; run `grpo generate --iteration 0` first"
    check(grpo, Case(f"{stage} before generate", nothing, (stage, "--iteration", "0"), 4, message))


def cut(name: str, num_bytes: int) -> Callable[[], object]:
    """Keep the first bytes of a file."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:num_bytes])


def swap(one: str, other: str) -> Callable[[], object]:
    """Exchange two files, or two folders."""

    def spoil() -> None:
        first, second = sorted(Path().glob(one))[0], sorted(Path().glob(other))[0]
        first.rename("aside")
        second.rename(first)
        Path("aside").rename(second)

    return spoil


def part(kind: Callable[[Path], object]) -> Callable[[], object]:
    """Do something to the first shard of the rollouts of iteration 0."""
    return lambda: kind(sorted(Path(ROLLOUTS).glob("part-*"))[0])


def sealed(config: object) -> Callable[[], object]:
    """A run.json that is whole, and of another version of grpo."""
    return write(RUN_JSON, seal({"config": config}))


def zero(path: Path) -> object:
    """The same length, every byte 0."""
    return path.write_bytes(bytes(path.stat().st_size))


def file_for_iteration() -> None:
    shutil.rmtree(Path(LATER).parent)
    Path(LATER).parent.write_text("x")


def staged_plan() -> None:
    path = Path(f"{TINY}/.staging/iteration=000002/rollouts-0/plan.json")
    path.parent.mkdir(parents=True)
    path.write_text('{"attempt": "x"}')


NOT_JSON = f"{MANIFEST}: is not JSON"
CHANGED = "content changed since it was committed (sha256 differs)"
GONE = "missing, though its manifest lists it"
DAMAGED = [
    # run.json
    Case("run.json: cut off", cut(RUN_JSON, 50), RUN_ON, 6, f"{RUN_JSON}: is not JSON"),
    Case("run.json: empty", write(RUN_JSON, ""), ["status"], 6, f"{RUN_JSON}: is not JSON"),
    Case(
        "run.json: a list", write(RUN_JSON, "[]"), ["show"], 6, "run.json: expected a JSON object, found list"
    ),
    Case("run.json: any bytes", write(RUN_JSON, b"\xff"), READ, 6, f"{RUN_JSON}: is not JSON"),
    Case("run.json: lists in lists", write(RUN_JSON, "[" * 10**5), ["gc"], 6, f"{RUN_JSON}: is not JSON"),
    Case("run.json: a folder", folder(RUN_JSON), RUN_ON, 6, f"{RUN_JSON}: cannot be read: Is a directory"),
    Case(
        "run.json: edited",
        sealed({"a": 1}),
        ["status", "tiny", "-c", "no"],
        4,
        "another version of grpo made",
    ),
    Case(
        "run.json: edited; run",
        sealed({"a": 1}),
        RUN_ON,
        4,
        "run.json: a: unknown key; known keys: run, iterat",
    ),
    Case("run.json: gone", Path(RUN_JSON).unlink, ["status"], 6, f"{RUN_JSON}: missing, though outputs of"),
    # manifests
    Case("a manifest: cut off", cut(MANIFEST, 50), RUN_ON, 6, NOT_JSON),
    Case("a manifest: empty", write(MANIFEST, ""), ["status"], 6, NOT_JSON),
    Case("a manifest: lists in lists", write(MANIFEST, "[" * 10**5), ["show"], 6, NOT_JSON),
    Case("a manifest: NaN", write(MANIFEST, '{"rows": NaN}'), READ, 6, f"{MANIFEST}: {CHANGED}"),
    Case("a manifest: a folder", folder(MANIFEST), RUN_ON, 6, f"{MANIFEST}: cannot be read: Is a directory"),
    Case(
        "a manifest: a link to itself",
        loop(MANIFEST),
        RUN_ON,
        6,
        "is a link to nowhere, not the run's own; `grpo verify --discard` removes it",
    ),
    Case("a manifest: cut off; fork", cut(MANIFEST, 50), ["fork", "tiny", "new"], 6, NOT_JSON),
    Case(
        "a manifest: newer",
        write(MANIFEST, '{"schema_version": 9}'),
        RUN_ON,
        4,
        "written by a newer grpo (schema 9",
    ),
    Case(
        "a manifest: gone",
        Path(MANIFEST).unlink,
        RUN_ON,
        4,
        "score of iteration 0 is stale (rollouts@0 is gone); `",
    ),
    Case(
        "a manifest: gone; fork",
        Path(MANIFEST).unlink,
        ["fork", "tiny", "new"],
        4,
        f"{ROLLOUTS}: missing; run",
    ),
    # pieces swapped
    Case(
        "manifests swapped",
        swap(MANIFEST, f"{REWARDS}/manifest.json"),
        RUN_ON,
        6,
        "holds what score of iteration 0",
    ),
    Case(
        "outputs swapped",
        swap(ROLLOUTS, REWARDS),
        ["gc"],
        6,
        f"{ROLLOUTS}: holds what score of iteration 0 made",
    ),
    Case(
        "iterations swapped",
        swap(ROLLOUTS, LATER),
        RUN_ON,
        6,
        f"{ROLLOUTS}: holds what generate of iteration 1",
    ),
    Case(
        "shards swapped",
        swap(f"{ROLLOUTS}/part-00000*", f"{REWARDS}/part-00000*"),
        AGAIN,
        6,
        "but its manifest says",
    ),
    # tables
    Case("a shard: gone", part(Path.unlink), AGAIN, 6, GONE),
    Case("a shard: gone; sql", part(Path.unlink), READ, 6, GONE),
    Case("a shard: a folder", part(lambda path: folder(str(path))()), AGAIN, 6, "but its manifest says"),
    Case(
        "a shard: a link to itself",
        part(lambda path: loop(str(path))()),
        READ,
        6,
        "Too many levels of symbolic",
    ),
    Case("a shard: zeroed", part(zero), AGAIN, 6, CHANGED),
    Case("a shard: zeroed; sql", part(zero), READ, 6, "cannot be read as Parquet"),
    Case(
        "a weight check: gone",
        Path(f"{TINY}/policy/weight_check.json").unlink,
        RUN_ON,
        6,
        f"weight_check.json: {GONE}",
    ),
    # folders and notes
    Case("an iteration: a file", file_for_iteration, RUN_ON, 7, "iteration=000001: File exists"),
    Case("a staged plan: no attempt", staged_plan, RUN_ON, 6, "plan.json: has no attempt of type int"),
    Case(
        "an intent of --from: no number",
        write(f"{TINY}/.from.json", '{"from": "x"}'),
        RUN_ON,
        6,
        ".from.json: has no from of type int",
    ),
    Case(
        "timings: a list",
        write(f"{ROLLOUTS}/timings.json", '{"seconds": [1]}'),
        ["status"],
        6,
        "timings.json: has no seconds of type dict",
    ),
    Case(
        "timings: text",
        write(f"{ROLLOUTS}/timings.json", '{"seconds": {"sample": "x"}}'),
        ["status"],
        6,
        "timings.json: the seconds of sample are no number",
    ),
    Case("the trash: a file", write(f"{TINY}/.trash", "x"), AGAIN, 7, ".trash: File exists"),
]


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.input)
def test_a_damaged_run_is_refused(finished: Path, grpo: Grpo, case: Case) -> None:
    check(grpo, case)


@pytest.mark.parametrize("name", ["iteration=abc", "iteration=²", "iteration=7", f"iteration=9{'0' * 99}"])
def test_a_folder_of_another_name_is_no_iteration(finished: Path, grpo: Grpo, name: str) -> None:
    before = grpo("status")
    Path(TINY, name).mkdir()
    Path(TINY, ".staging", name).mkdir()
    assert grpo("status") == before
    assert [grpo(*command)[0] for command in (RUN, READ, ["verify"], ["gc"])] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "damage", [swap(ROLLOUTS, REWARDS), swap(ROLLOUTS, LATER)], ids=["outputs", "iterations"]
)
def test_verify_finds_what_was_swapped(finished: Path, grpo: Grpo, damage: Callable[[], object]) -> None:
    damage()
    code, out, _ = grpo("verify")
    assert code == 6
    assert out.count("damaged  ") == 2
