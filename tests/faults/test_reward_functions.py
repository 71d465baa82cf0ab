"""Reward functions that fail for some rollouts: those are recorded, the others scored, and nothing hangs."""

import json
from pathlib import Path

import pytest
from tests.conftest import Grpo, NewTally

pytestmark = pytest.mark.slow
REWARD = """\
import ctypes, os, signal, time


def bad(text):
    return sum(map(ord, text)) % 3 == 0


def code(prompts, completions, **columns):
    return [({failure}) if bad(text) else 1.0 for text in completions]
"""
# What happens -> (how a function comes to it, the status of the rollout, a piece of its error).
FAILURES = {
    "hangs": ("time.sleep(600)", "timeout", "no result within 0.5 s"),
    "hangs holding the interpreter": ("ctypes.PyDLL(None).sleep(600)", "timeout", "no result within 0.5 s"),
    "crashes the process": ("ctypes.string_at(0)", "error", "ended during the call (SIGSEGV"),
    "is killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "error",
        "ended during the call (SIGKILL",
    ),
    "ends the process": ("os._exit(3)", "error", "ended during the call"),
    "raises": ("1 / 0", "error", "ZeroDivisionError: division by zero"),
    "returns NaN": ("float('nan')", "nonfinite", "returned nan"),
    "returns infinity": ("float('-inf')", "nonfinite", "returned -inf"),
    "returns a string": ("'1.0'", "error", "returned str '1.0', not a number"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_is_recorded_and_the_others_are_scored(
    project: Path, grpo: Grpo, failure: str, new_tally: NewTally
) -> None:
    how, status, error = FAILURES[failure]
    (project / "reward.py").write_text(REWARD.format(failure=how))
    reward = "score.rewards=[{function: 'reward:code', timeout_s: 0.5}]"
    options = ["--set", reward, "--set", "generate.samples_per_prompt=4"]
    tally = new_tally("a reward function fails", failure)
    assert grpo("generate", "--iteration", "0", *options)[0] == 0
    with tally.trial():
        code, _, err = grpo("score", "--iteration", "0", *options)
        assert code == 8, err
        keys = "using (iteration, group_id, sample_id)"
        query = f"select response, status, value, error from samples join rewards {keys}"
        rows = json.loads(grpo("sql", query, "--json")[1])
        bad = [row for row in rows if sum(map(ord, row["response"])) % 3 == 0]
        assert 0 < len(bad) < len(rows) == 12
        assert f"{len(bad)} of 12 rewards failed ({len(bad)} {status})" in err
        for row in rows:
            if row in bad:
                assert (row["status"], row["value"]) == (status, None)
                assert error in row["error"]
            else:
                assert (row["status"], row["value"], row["error"]) == ("ok", 1.0, None)
        code, _, err = grpo("advantage", "--iteration", "0", *options)
        assert code == 4, err
        drop = ["--set", "score.on_error=drop"]
        assert grpo("run", "--until", "1", *options, *drop)[0] == 0


@pytest.mark.parametrize("number", [0, 1, 3])
def test_too_few_or_too_many_values_fail_the_whole_call(
    project: Path, grpo: Grpo, number: int, new_tally: NewTally
) -> None:
    source = f"def code(completions): return [1.0] * {number}\n"
    (project / "reward.py").write_text(source)
    tally = new_tally("a reward function fails", f"returns {number} values for 2")
    with tally.trial():
        code, _, err = grpo("run")
        assert code == 8, err
        rows = json.loads(grpo("sql", "select status, error from rewards", "--json")[1])
        assert rows == [{"status": "error", "error": f"returned {number} values for 2 rollouts"}] * 6
