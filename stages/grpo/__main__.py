"""`python -m grpo`: the command `grpo`."""

from grpo.cli import main

main()
