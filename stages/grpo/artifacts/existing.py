"""artifacts.existing: runs that exist, by name or by path, and what they were created with."""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from grpo.artifacts.layout import is_iteration
from grpo.artifacts.lock import holder_here
from grpo.artifacts.manifest import read_sealed
from grpo.artifacts.run import Run
from grpo.config import PIPELINE, Config, load, validated
from grpo.errors import CorruptError, InputError, LockedError, ResourceError, UsageError, listed

ARTIFACTS = Path("artifacts")


def find_run(given: str, root: Path = ARTIFACTS) -> Path:
    """The folder of a run: of that name below `root`, else at that path. It is the run, whatever it holds.

    Raises UsageError (exit 2) naming the runs that are there, LockedError (exit 5) for one that is prepared,
    CorruptError (exit 6) for one without run.json, ResourceError (exit 7) without the right to look.
    """
    path = Path(given)
    is_name = path.name == given
    for folder in (root / given, path) if is_name else (path,):
        if is_run(folder):
            return folder if folder.name not in ("", "..") else folder.resolve()
        if _is_closed(folder):
            raise ResourceError(f"{folder}: Permission denied; ask its owner for the right to read it")
        if lacks_run_json(folder):
            place, way = folder.resolve(), "restore it from a copy"
            if place.parent == ARTIFACTS.resolve():
                way = f"with its pipeline.yaml, `grpo run -c FILE --set run={place.name}` writes it again"
            raise CorruptError(f"{folder / 'run.json'}: missing, though outputs of the run are there; {way}")
        if holder := holder_here(folder):
            raise LockedError(f"{folder}: no run yet: {holder} prepares it, its model and its prompts; wait")
    known = run_names(root)
    there = (
        f"runs there: {listed(known, path.name)}" if known else "no run is there yet; `grpo run` makes one"
    )
    raise UsageError(f"{root / given if is_name else path}: no such run; {there}")


def find_runs(given: str, root: Path = ARTIFACTS) -> list[str]:
    """Runs that a pattern such as `lr-*` means, by names or paths; what is no pattern means itself.

    Raises UsageError (exit 2) for one that means none.
    """
    if not set("*?[") & set(given) or names_run(given):
        return [given]
    path = Path(given)
    is_name = path.name == given
    folder = root if is_name else path.parent
    found = [each for each in run_names(folder) if fnmatchcase(each, path.name)]
    if not found:
        there = listed(run_names(folder), path.name) or "none"
        raise UsageError(f"{given}: no such run; runs there: {there}")
    return found if is_name else [str(folder / each) for each in found]


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths are one folder. A link to it is another: whoever names the link meant that."""
    return one.parent.resolve() / one.name == other.parent.resolve() / other.name


def names_run(given: str) -> bool:
    """Whether find_run() finds one; CorruptError as it raises."""
    try:
        return bool(find_run(given))
    except UsageError:
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    try:
        return (folder / "run.json").exists()
    except OSError:  # a name too long
        return False


def _is_closed(folder: Path) -> bool:
    """Whether a folder is another user's, who gave no right to look into it."""
    try:
        return folder.is_dir() and not os.access(folder, os.X_OK, effective_ids=True)
    except OSError:  # a name too long
        return False


def lacks_run_json(folder: Path) -> bool:
    """Whether a folder holds what runs hold, but no run.json.

    An iteration, that is: what is there before the first may have lost it with the power, and `grpo run`
    begins again.
    """
    try:
        if folder.name.startswith(".") or not folder.is_dir() or is_run(folder):
            return False
        return any(is_iteration(path.name) and path.is_dir() for path in folder.iterdir())
    except OSError:  # a name too long, or not ours to read
        return False


def open_run(folder: Path) -> dict[str, Any]:
    """What `run.json` of an existing run holds. Raises CorruptError (exit 6) where it changed."""
    path = folder / "run.json"
    try:
        data = read_sealed(path)
    except CorruptError as error:
        way = f"with its pipeline.yaml, `grpo verify -c FILE --set run={folder.name} --discard` sets it aside"
        raise CorruptError(f"{error}; {way}") from None
    if not isinstance(data.get("config"), dict) or "schema_version" in data:  # a manifest in its place
        raise CorruptError(f"{path}: holds no configuration of a run")
    versions = data.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(each, str) for each in versions.values()):
        raise CorruptError(f"{path}: versions: expected text by name")
    return data


def created_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run was created with, and `overrides`; its name is the folder's.

    Raises InputError (exit 4) where it is not one of this version of grpo; else as open_run().
    """
    data = open_run(folder).get("config")
    try:
        config = validated(data, folder / "run.json", overrides)
    except UsageError as error:
        if overrides:
            raise
        raise InputError(f"{error}; another version of grpo made this run") from None
    return config.model_copy(update={"run": folder.name})


def own_config(folder: Path, overrides: Sequence[str] = (), damaged: bool = False) -> Config:
    """The configuration of a run by its folder: of the pipeline.yaml in it, which a fork has, else run.json.

    damaged: with a pipeline.yaml run.json is not looked at. Raises
    UsageError (exit 2), InputError (4) for one of another version, CorruptError (6).
    """
    own = folder / PIPELINE
    if not own.is_file():
        return created_config(folder, overrides)
    if not damaged:
        open_run(folder)
    return load(own, overrides).model_copy(update={"run": folder.name})


def run_names(root: Path = ARTIFACTS) -> list[str]:
    """Names of the runs that are there."""
    found = (
        path for path in root.glob("*") if not path.name.startswith(".")
    )  # a dot: a fork that was killed
    return sorted(path.name for path in found if is_run(path) or lacks_run_json(path))


def tell_apart(runs: Sequence[Run]) -> None:
    """Call runs that are looked at together by their paths, where their folders have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)


def refuse_inside_run(out: Path, option: str = "--out") -> None:
    """Raise UsageError (exit 2) where `out` would land in the folder of a run, links followed."""
    place, root = Path(os.path.realpath(out)), Path(os.path.realpath(ARTIFACTS))
    for folder in (place, *place.parents):
        # Another run.json may lie in any folder: that of a run has a lock or a policy beside it.
        whole = is_run(folder) and any((folder / name).exists() for name in (".lock", "policy"))
        whole = whole or lacks_run_json(folder)
        if whole or is_iteration(folder.name) or (folder != place and folder.parent == root):
            raise UsageError(
                f"{option} {out}: lies in a run ({folder}), which only grpo writes; name another place"
            )
