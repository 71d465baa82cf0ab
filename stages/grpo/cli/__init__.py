"""cli: the command `grpo`. Data goes to stdout, everything else to stderr.

Every command is in entry.py's table. Nothing heavy is imported before a command runs.
"""

from grpo.cli.entry import app, main

__all__ = ["app", "main"]
