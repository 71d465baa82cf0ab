"""What `grpo gc` removes, and what it leaves."""

import json
import re
from pathlib import Path

from tests.conftest import Grpo
from tests.faults import crash

from grpo.artifacts import IN_MEMORY, Run, lent_folders

RUN = crash.RUN


def removed(grpo: Grpo, *options: str) -> list[tuple[str, str]]:
    code, out, err = grpo("gc", "--json", *options)
    document = json.loads(out)
    assert (code, err, document["dry_run"]) == (0, "", "--dry-run" in options)
    return [(row["what"], str(Path(row["path"]).relative_to(RUN))) for row in document["garbage"]]


def test_nothing_to_remove(finished: Path, grpo: Grpo) -> None:
    assert removed(grpo) == []


def test_trash_and_abandoned_staging_go_and_work_to_go_on_with_stays(finished: Path, grpo: Grpo) -> None:
    assert grpo("advantage", "--iteration", "1", "--force")[0] == 0
    before = crash.contents(Path())
    folder = Path()
    # Killed at the third operation of each: staged work of the present configuration, and of another one.
    code, _ = crash.in_child(folder, ["run", "--set", "iterations=3"], "kill:12")
    assert code == -9
    [begun] = (RUN / ".staging/iteration=000002").iterdir()
    options = ["--iteration", "0", "--force", "--set", "advantage.scale=none"]
    code, _ = crash.in_child(folder, ["advantage", *options], "kill:5")
    assert code == -9
    [other] = (RUN / ".staging/iteration=000000").iterdir()
    (RUN / ".staging/perturbed").mkdir()
    expected = [
        ("trash", ".trash/iteration=000001-advantages.0"),
        ("abandoned staging", ".staging/perturbed"),
        ("abandoned staging", str(other.relative_to(RUN))),
    ]
    assert removed(grpo, "--dry-run") == expected
    assert other.exists()
    assert removed(grpo) == expected
    assert not other.exists()
    assert not (RUN / ".staging/iteration=000000").exists()
    assert begun.exists()
    assert crash.contents(Path()) == before
    assert removed(grpo) == []


def test_what_is_small_is_summed_by_kind(finished: Path, grpo: Grpo) -> None:
    for number in range(30):
        (RUN / f".trash/{number}").mkdir(parents=True)
        (RUN / f".trash/{number}/x").write_bytes(bytes(35_000))
    (RUN / ".trash/large").write_bytes(bytes(2**21))
    (RUN / ".staging/perturbed").mkdir(parents=True)
    lines = [line.split(maxsplit=2) for line in grpo("gc", "--dry-run")[1].splitlines()]
    assert lines == [  # 30 * 35,000 bytes are 1.0 MiB
        ["1.0", "MiB", "trash              30 below 0.1 MiB"],
        ["0.0", "MiB", "abandoned staging  1 below 0.1 MiB"],
        ["2.0", "MiB", "trash              .trash/large"],
        ["3.0", "MiB", "would be removed from run tiny"],
    ]


def test_work_on_what_is_not_committed_stays_whatever_it_is_of(finished: Path, grpo: Grpo) -> None:
    begun = []
    for seed in ("1.0", "0.9"):
        options = ["--set", "iterations=3", "--set", f"generate.temperature={seed}"]
        assert crash.in_child(Path(), ["run", *options], "kill:12")[0] == -9
        begun = list((RUN / ".staging/iteration=000002").iterdir())
    assert len(begun) == 2
    assert removed(grpo) == removed(grpo, "tiny") == []


def test_by_name_with_set(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", "--set", "iterations=4", "--set", "checkpoints.keep_last=null")[0] == 0
    options = ["tiny", "-c", "none.yaml", "--set", crash.KEEP_2]
    found = removed(grpo, "--dry-run", *options)
    assert found == [("checkpoint", f"iteration={number:06d}/checkpoint") for number in (0, 1)]
    # What a kill left of a prune is shown before it goes.
    assert crash.in_child(Path(), ["gc", *options], "kill:9")[0] == -9
    rest = removed(grpo, "--dry-run", *options)
    assert rest
    assert removed(grpo, *options) == rest
    assert removed(grpo, *options) == []
    assert grpo("verify")[0] == 0


def test_a_checkpoint_that_is_no_longer_kept_goes(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", "--set", "iterations=5", "--set", "checkpoints.keep_last=null")[0] == 0
    keep = ["--set", "checkpoints={keep_last: 2, keep_every: 2}"]
    # Policies 1 to 5; 4 and 5 are the newest, 2 is a multiple of 2.
    expected = [("checkpoint", f"iteration={number:06d}/checkpoint") for number in (0, 2)]
    assert removed(grpo, "--dry-run", *keep) == expected
    assert removed(grpo, *keep) == expected
    for number in range(5):
        assert (RUN / f"iteration={number:06d}/checkpoint").exists() == (number not in (0, 2))
        assert (RUN / f"iteration={number:06d}/update/manifest.json").exists()
    code, out, _ = grpo("verify", "--json")
    assert (code, json.loads(out)["policies"]["on_disk"]) == (0, [0, 2, 4, 5])


def test_of_all_checkpoints_the_newest_stays(measured: Path, grpo: Grpo) -> None:
    """Whatever `checkpoints` keeps, the best too; the next command rebuilds one that it needs."""
    options = ["--set", "iterations=4", "--set", "checkpoints={every: 1, keep_last: null}"]
    assert grpo("run", *options)[0] == 0
    expected = [("checkpoint", f"iteration={number:06d}/checkpoint") for number in (0, 1, 2)]
    assert removed(grpo, "--checkpoints", "--dry-run", *options) == expected
    assert removed(grpo, "--checkpoints", *options) == expected
    assert removed(grpo, "--checkpoints", *options) == []
    status = json.loads(grpo("status", "--json")[1])["policies"]
    assert (status["on_disk"], status["newest"], status["updates"]) == ([0, 4], 4, 0)


def test_an_unfinished_checkpoint_is_shown_and_goes(project: Path, grpo: Grpo, tmp_path: Path) -> None:
    command = ["run", "--until", "1"]
    operations = crash.recorded(crash.copy(Path(), tmp_path / "copy"), command)
    at = next(n for n, made in enumerate(operations, 1) if "/optimizer/" in f"{made.path} {made.other}")
    assert crash.in_child(Path(), command, f"kill:{at}")[0] == -9  # the policy is there, its moments are not
    [begun] = (RUN / ".staging/iteration=000000").glob("checkpoint-*")
    assert removed(grpo, "--dry-run") == [("checkpoint", str(begun.relative_to(RUN)))]
    assert removed(grpo) == [("checkpoint", str(begun.relative_to(RUN)))]
    assert not begun.exists()
    assert removed(grpo) == []
    code, _, err = grpo(*command)
    assert (code, "1 iterations are complete" in err) == (0, True), err


def test_weights_that_a_killed_process_had_lent_to_engines_go(
    project: Path, grpo: Grpo, tmp_path: Path
) -> None:
    command = ["run", "--set", "execution={engines: {count: 1}}", "--set", "checkpoints.every=9"]
    operations = crash.recorded(crash.copy(Path(), tmp_path / "copy"), command)
    at = next(n for n, made in enumerate(operations, 1) if re.search("=000001/rollouts-.*/part-", made.path))
    assert crash.in_child(Path(), command, f"kill:{at}")[0] == -9  # policy 1 was in memory alone
    [lent] = lent_folders(Run(RUN.parent, RUN.name))
    assert lent.parent == IN_MEMORY
    assert (lent / "model.safetensors").stat().st_size > 0
    linked = RUN / ".weights-0123456789ab-x"  # as where it is on disk, of a run that was moved since
    linked.mkdir()
    (lent / "larger").write_bytes(bytes(2**21))  # as those of a real model are: its path is shown
    code, out, _ = grpo("gc", "--dry-run", "--json")
    rows = json.loads(out)["garbage"]
    assert code == 0
    assert [(row["what"], Path(row["path"])) for row in rows] == [
        ("lent weights", lent),
        ("lent weights", linked),
    ]
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in lent.iterdir())
    assert f"lent weights       {lent}" in grpo("gc")[1]
    assert not lent.exists()
    assert not linked.exists()
    assert removed(grpo) == []
    code, _, err = grpo(*command)
    assert code == 0, err
    assert lent_folders(Run(RUN.parent, RUN.name)) == []


def test_it_does_not_run_beside_another_process(finished: Path, grpo: Grpo) -> None:
    from filelock import FileLock

    lock = FileLock(RUN / ".lock")
    with lock:
        code, _, err = grpo("gc")
        assert (code, err.startswith(f"error: {RUN}: in use by")) == (5, True)
        assert grpo("gc", "--dry-run")[0] == 0
