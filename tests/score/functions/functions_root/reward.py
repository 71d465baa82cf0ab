# mypy: ignore-errors
"""Reward functions that go wrong in every way that test_functions.py tries; a rollout "bad" sets them off."""

import asyncio
import ctypes
import os
import signal
import sys
import time

import numpy as np

SECONDS_OF_A_HANG = 600


def length(completions):
    return [len(completion) for completion in completions]


def _unless_bad(completions, bad):
    return [bad() if completion == "bad" else len(completion) for completion in completions]


def hangs(completions):
    return _unless_bad(completions, lambda: time.sleep(SECONDS_OF_A_HANG))


def hangs_holding_the_interpreter(completions):
    # PyDLL keeps the interpreter lock during the call, so no Python code of the worker can run.
    return _unless_bad(completions, lambda: ctypes.PyDLL(None).sleep(SECONDS_OF_A_HANG))


def segfaults(completions):
    return _unless_bad(completions, lambda: ctypes.string_at(0))


def is_killed(completions):
    return _unless_bad(completions, lambda: os.kill(os.getpid(), signal.SIGKILL))


def exits_hard(completions):
    return _unless_bad(completions, lambda: os._exit(3))


def exits_hard_with_success(completions):
    return _unless_bad(completions, lambda: os._exit(0))


def exits(completions):
    return _unless_bad(completions, lambda: sys.exit("done"))


def raises(completions):
    return _unless_bad(completions, lambda: 1 / 0)


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__("first\nline\x1b[31m")


def raises_unpicklable(completions):
    def bad():
        raise UnpicklableError(1, 2)

    return _unless_bad(completions, bad)


def raises_long(completions):
    raise ValueError("x" * 10_000)


def odd_values(completions):
    values = {
        "nan": float("nan"),
        "inf": -np.inf,
        "none": None,
        "text": "1.0",
        "list": [1.0],
        "true": True,
        "int": 7,
        "huge": 10**400,
        "float32": np.float32(0.5),
        "array0d": np.array(3),
        "array1d": np.array([1.0]),
    }
    return [values[completion] for completion in completions]


def one_too_few(completions):
    return [1.0] * (len(completions) - 1)


def too_few_for_groups(completions):
    return [1.0] * min(len(completions), 1)


def a_number(completions):
    return 1.0


def an_array(completions):
    return np.arange(len(completions), dtype=np.float32)


def a_tensor(completions):
    import torch

    return torch.arange(len(completions), dtype=torch.bfloat16, requires_grad=True)


def a_list_of_tensors(completions):
    import torch

    return [torch.tensor(0.25) for _ in completions]


def torch_is_imported(completions):
    return [float("torch" in sys.modules) for _ in completions]


async def waits(completions):
    import asyncio

    await asyncio.sleep(0.01)
    return [2.0 for _ in completions]


def prints(completions):
    print("printed by a reward function")
    os.system("echo echoed by a reward function")
    return [0.0 for _ in completions]


def trl_style(prompts, completions, completion_ids, answer, bonus=0.0, **kwargs):
    """TRL's signature, chat completions and a column; **kwargs gets the columns that are not named."""
    assert sorted(kwargs) == ["level", "log_extra", "log_metric", "trainer_state"]
    return [
        float(prompt[-1]["content"] + completion[0]["content"] == right) + bonus + len(ids)
        for prompt, completion, ids, right in zip(prompts, completions, completion_ids, answer, strict=True)
    ]


async def waits_for_a_client(completions):
    """Like a client's connections, a lock is bound to the event loop in which it first had to wait."""
    import asyncio

    async def once():
        async with LOCK:
            await asyncio.sleep(0.01)

    await asyncio.gather(once(), once())
    return [2.0 for _ in completions]


LOCK = asyncio.Lock()


def needs_trl_keywords(completions, trainer_state, log_extra, log_metric):
    log_extra("length", [len(text) for text in completions])
    log_metric("longest", max(map(len, completions)))
    return [10.0 * trainer_state.global_step + len(text) for text in completions]


def logs_too_much(completions, log_metric):
    log_metric(1, 2, 3)
    return [1.0 for _ in completions]


def logs_by_keyword(completions, log_extra, log_metric):
    log_extra(column="length", values=[len(text) for text in completions])
    log_metric(name="longest", value=3.0)
    return [1.0 for _ in completions]


def needs_max_steps(completions, trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


def needs_environments(completions, environments):
    return [environment.score for environment in environments]


class Callable:
    __name__ = "callable_reward"

    def __call__(self, completions):
        return [5.0 for _ in completions]


def factory(bonus=1.0):
    return lambda completions, **kwargs: [bonus for _ in completions]


an_object = Callable()
not_callable = 5


def positional_only(completions, /):
    return [0.0 for _ in completions]


def mutates(prompts, completions, answer):
    answer.clear()
    return [1.0 for _ in completions]


def empties(completions):
    completions.clear()
    return []
