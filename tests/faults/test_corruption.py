"""Files that changed behind the pipeline's back: found before they are used, set aside, and made again."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import extent

pytestmark = [pytest.mark.slow, pytest.mark.sampled]
TIMES = extent("files damaged in each way")
STAGES = ("generate", "score", "advantage", "update")
READERS = {"rollouts": "score", "rewards": "advantage", "advantages": "update"}  # output -> who reads it
CHANCE = random.Random(0)


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[CHANCE.randrange(len(content))] ^= 1 << CHANCE.randrange(8)
    path.write_bytes(content)


def cut(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: CHANCE.randrange(len(content) - 1)])  # a manifest's last byte is a newline


def zero(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    first = CHANCE.randrange(max(1, len(content) - 512))
    content[first : first + 512] = bytes(len(content[first : first + 512]))
    path.write_bytes(content)


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "one flipped bit": flip,
    "truncated": cut,
    "a zeroed block": zero,
    "deleted": delete,
    "swapped with another": swap,
}


def committed_files(folder: Path) -> list[Path]:
    """Every file of the run whose content matters, by name."""
    left_out = ("timings.json", ".lock")
    run = folder / crash.RUN
    found = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    return [path for path in found if path.name not in left_out and path.parts[0][0] != "."]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_before_use_and_undone(
    complete: Path, tmp_path: Path, damage: str, new_tally: NewTally
) -> None:
    names = committed_files(complete)
    if damage == "deleted":  # without its manifest an output is not committed, and made again
        names = [name for name in names if name.name not in ("run.json", "manifest.json")]
    expected = crash.contents(complete)
    tally = new_tally(f"a file damaged: {damage}", "each type of artifact")
    first = list(DAMAGES).index(damage) * len(names) // len(DAMAGES)  # each damage begins with another file
    for number in range(TIMES):
        name = names[(first + number * len(names) // min(TIMES, len(names))) % len(names)]
        folder = crash.copy(complete, tmp_path / "damaged")
        path = folder / crash.RUN / name
        before = path.read_bytes()
        others = [folder / crash.RUN / other for other in names if other.suffix == name.suffix]
        others = [other for other in others if other.read_bytes() != before]
        DAMAGES[damage](path, CHANCE.choice(others or [path]))
        if path.exists() and path.read_bytes() == before:
            continue  # a block of zeros that was zeroed, a file with no other to be swapped with
        with tally.trial():
            if command := next_reader(name):
                code, err = crash.in_child(folder, command)
                assert (code, str(name) in err or str(name.parent) in err) == (6, True), (name, command, err)
            code, _ = crash.in_child(folder, ["verify", "--discard"])
            assert code == 6, name
            again = [[stage, "--iteration", iteration] for iteration in ("0", "1") for stage in STAGES]
            crash.succeed_all(folder, [*again, ["run"], ["verify"]])
            assert crash.contents(folder) == expected, name


def next_reader(name: Path) -> list[str] | None:
    """A command that reads the file, given relative to its run; None: only queries do."""
    if name.parts[0] == "prompts":
        return ["generate", "--iteration", "0", "--force"]
    if name.parts[0] == "run.json":
        return ["run"]
    if len(name.parts) < 3:
        return None
    iteration, output = int(name.parts[0].removeprefix("iteration=")), name.parts[1]
    if output in READERS:
        return [READERS[output], "--iteration", str(iteration), "--force"]
    if name.name == "manifest.json" or "policy" in name.parts:
        return ["run", "--until", "3"] if iteration == 1 else ["generate", "--iteration", "1", "--force"]
    return None
