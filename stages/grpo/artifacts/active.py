"""artifacts.active: a run and the work on it: the configuration in force, its folder, who is told."""

from pathlib import Path
from typing import Any

from grpo.artifacts.checkpoint import checkpoint_id, find_checkpoint
from grpo.artifacts.run import Run
from grpo.config import Config
from grpo.console import Console


class ActiveRun(Run):
    """A run under a configuration: what writes takes this, and what reads where the configuration matters.

    imports: the configuration's folder, where relative paths and the user's modules are found.
    accept_replay: whether a policy that is rebuilt may be another than the recorded one.
    ranks: the processes that train together, where there are several (update/parallel.py).
    start: checkpoints the run stands on, `policy` and `reference`; empty until they were found to be right.
    """

    def __init__(self, root: Path, config: Config, imports: Path, console: Console) -> None:
        super().__init__(root, config.run)
        self.config = config
        self.imports = imports
        self.console = console
        self.start: dict[str, Path] = {}
        self.accept_replay = False
        self.ranks: Any = None
        self._checkpoint_ids: dict[str, str] = {}

    def checkpoint_path(self, name: str) -> Path:
        """Directory of a configured checkpoint: relative to the configuration's folder, or from the hub."""
        revision = self.config.model_options.revision if name == self.config.model else None
        return find_checkpoint(name, self.imports, revision)

    def checkpoint_id(self, name: str) -> str:
        """Id of a configured checkpoint, computed once per process."""
        if name not in self._checkpoint_ids:
            self._checkpoint_ids[name] = checkpoint_id(self.checkpoint_path(name))
        return self._checkpoint_ids[name]
