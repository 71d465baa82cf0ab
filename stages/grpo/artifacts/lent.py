"""artifacts.lent: folders with a policy's weights, for processes that read them while a run is worked on.

They are in the run where other machines read them or its own checkpoint gets a second name, else in memory,
or where temporary files are.
"""

import hashlib
from pathlib import Path
from tempfile import gettempdir

from grpo.artifacts.run import Run

IN_MEMORY = Path("/dev/shm")
_PREFIX = ".weights-"


def lent_prefix(run: Run) -> str:
    """Of the names of such folders, which say whose they are."""
    return f"{_PREFIX}{hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:12]}-"


def lent_folders(run: Run) -> list[Path]:
    """Those that are there. Who holds the run's lock and has made none sees what killed processes left."""
    elsewhere = {folder for folder in (IN_MEMORY, Path(gettempdir())) if folder.is_dir()}
    found = {path for folder in elsewhere for path in folder.glob(f"{lent_prefix(run)}*")}
    # In the run, those of any name: it may have been moved, or copied, since.
    return sorted(found | set(run.path.glob(f"{_PREFIX}*")))
