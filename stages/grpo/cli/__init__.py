"""cli: the command `grpo`. Data goes to stdout, everything else to stderr.

The commands are in work.py, read.py and keep.py, in the order in which `grpo --help` lists them. Nothing
heavy is imported before a command runs.
"""

from grpo.cli import work, inspect, manage  # noqa: F401, I001 - importing them makes the commands, in this order
from grpo.cli.entry import app, main

__all__ = ["app", "main"]
