"""fates: a surrogate that ends, or spoils, a chosen process of those that train together."""

SURROGATE = """\
import os
import signal
from pathlib import Path

from torch import distributed

FATE = Path("fate")


def surrogate(logprobs, old_logprobs, advantages, rollout):
    fate = FATE.read_text() if FATE.exists() and int(rollout[-1]) != 1 else ""
    what, _, who = fate.partition(" ")
    if what == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if who == str(distributed.get_rank() if distributed.is_initialized() else 0):
        if what == "once":
            FATE.unlink()
        if what in ("once", "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "bug":
            raise SystemError("a bug")
        if what == "nan":
            return logprobs * advantages * float("nan")
    return logprobs * advantages
"""
"""Called in each process for its share of a step; the file `fate` says what becomes of whom, as `kill 1`."""
UPDATE = ("--set", "update={objective: dapo, surrogate: 'mine:surrogate', learning_rate: 0.01}")
SAMPLED = ("--set", "generate.prompts_per_iteration=6", "--set", "generate.samples_per_prompt=3")
RUN = ("run", *UPDATE, *SAMPLED)
