"""init: nothing -> the folder of a project that runs at once, offline and without a GPU.

What is written are the files of project/ beside this one, byte for byte.
"""

from importlib.resources import files as resources
from pathlib import Path

from grpo.artifacts import files, refuse_inside_run
from grpo.errors import GrpoError, UsageError

FILES = ("prompts.jsonl", "reward.py", "test_reward.py", "pipeline.yaml")  # the last makes it a project


def create(folder: Path) -> list[Path]:
    """Write the files of a new project into `folder`, which is made where it is missing; returns their paths.

    All of them or none. Raises UsageError (exit 2) where one of them is there already.
    """
    paths = [folder / name for name in FILES]
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder for the new project")
    if there := [path for path in paths if path.exists() or path.is_symlink()]:
        raise UsageError(f"{there[0]}: is there already; name another folder for the new project")
    refuse_inside_run(folder, "init")
    source = resources("grpo.manage.init") / "project"
    is_new = not folder.exists()
    try:
        files.make_folder(folder)
        for path in paths:
            files.write_file(path, (source / path.name).read_bytes())
        files.sync_folder(folder)
    except GrpoError:
        for path in paths:
            files.remove_file(path)
            files.remove_file(path.with_name(path.name + ".tmp"))
        if is_new:
            files.remove(folder)
        raise
    return paths
