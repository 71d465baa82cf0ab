"""cli: the command `grpo`. Data goes to stdout, everything else to stderr."""

from grpo.cli.entry import main

__all__ = ["main"]
