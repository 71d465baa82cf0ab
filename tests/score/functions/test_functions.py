import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from grpo.config import RewardConfig
from grpo.score.functions.call import GroupCall
from grpo.score.functions.pool import FunctionPool
from grpo.score.outcome import Outcome

ROOT = Path(__file__).parent / "functions_root"
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def pool() -> Iterator[FunctionPool]:
    pool = FunctionPool(ROOT, num_workers=2)
    yield pool
    pool.close()


def spec(function: str, timeout_s: float = 20.0, **arguments: Any) -> RewardConfig:
    return RewardConfig(function=f"reward:{function}", arguments=arguments, timeout_s=timeout_s)


def group(*completions: str, **columns: list[Any]) -> GroupCall:
    return GroupCall(["p"] * len(completions), completions, [[1]] * len(completions), columns)


def score_one(pool: FunctionPool, function: RewardConfig, *completions: str) -> list[Outcome]:
    (outcomes,) = pool.score(function, [group(*completions)])
    return outcomes


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def error_of(outcome: Outcome) -> str:
    assert outcome.error is not None
    return outcome.error


# ---- what goes wrong in a call ----


@pytest.mark.parametrize("function", ["hangs", "hangs_holding_the_interpreter"])
def test_hang_is_a_timeout_of_the_guilty_rollout_only(pool: FunctionPool, function: str) -> None:
    started = time.monotonic()
    outcomes = score_one(pool, spec(function, TIMEOUT_S), "a", "bad", "ccc")
    assert outcomes[0] == Outcome(1.0, "ok")
    assert outcomes[2] == Outcome(3.0, "ok")  # the length of "ccc"
    assert outcomes[1].status == "timeout"
    assert error_of(outcomes[1]).startswith("no result within 1 s (in <lambda>, reward.py, line ")
    # One time-out for the group, one for the rollout, and three worker starts, on a loaded machine.
    assert time.monotonic() - started < 40


def test_hang_of_every_rollout_is_bounded(pool: FunctionPool) -> None:
    started = time.monotonic()
    outcomes = score_one(pool, spec("hangs", TIMEOUT_S), *["bad"] * 4)
    assert statuses(outcomes) == ["timeout"] * 4
    assert time.monotonic() - started < 60  # 600 s is the hang of one rollout


@pytest.mark.parametrize(
    ("function", "ending"),
    [
        ("segfaults", "SIGSEGV"),
        ("is_killed", "SIGKILL, perhaps out of memory"),
        ("exits_hard", "exit status 3"),
    ],
)
def test_crash_is_an_error_of_the_guilty_rollout_only(pool: FunctionPool, function: str, ending: str) -> None:
    outcomes = score_one(pool, spec(function), "a", "bad", "ccc")
    assert outcomes[0] == Outcome(1.0, "ok")
    assert outcomes[1] == Outcome(None, "error", f"the process ended during the call ({ending})")
    assert outcomes[2] == Outcome(3.0, "ok")


def test_exit_with_success_is_an_error_at_once(pool: FunctionPool) -> None:
    started = time.monotonic()
    outcomes = score_one(pool, spec("exits_hard_with_success"), "a", "bad")
    error = "the process ended during the call (exit status 0)"
    assert outcomes == [Outcome(1.0, "ok"), Outcome(None, "error", error)]
    assert time.monotonic() - started < 15  # of a time-out of 20 s


def test_exception_is_an_error_with_type_and_place(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("raises"), "a", "bad", "ccc")
    assert statuses(outcomes) == ["ok", "error", "ok"]
    assert error_of(outcomes[1]).startswith("ZeroDivisionError: division by zero (reward.py, line ")


def test_sys_exit_is_only_the_rollouts_failure(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("exits"), "a", "bad")
    assert outcomes[0] == Outcome(1.0, "ok")
    assert error_of(outcomes[1]).startswith("SystemExit: done (reward.py, line ")


def test_error_text_is_one_clean_line(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("raises_unpicklable"), "a", "bad")
    # The newline and the escape character are gone; what followed the escape is harmless text.
    assert error_of(outcomes[1]).startswith("reward.UnpicklableError: first line [31m (reward.py, line ")


def test_error_text_has_at_most_500_characters(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("raises_long"), "a")
    assert len(error_of(outcomes[0])) == 500
    assert error_of(outcomes[0]).startswith("ValueError: xxx")


def test_wrong_number_of_values(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("one_too_few"), "a", "b")
    assert statuses(outcomes) == ["error", "error"]
    assert error_of(outcomes[0]).startswith("returned 1 values for 2 rollouts")


def test_wrong_number_of_values_for_groups_only(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("too_few_for_groups"), "a", "b")
    # Not repeated one by one, where the count would seem right.
    assert outcomes == [Outcome(None, "error", "returned 1 values for 2 rollouts")] * 2


def test_a_function_that_empties_its_argument(pool: FunctionPool) -> None:
    call = GroupCall(["1+1="] * 2, ["a", "b"], [[1], [2]], {})
    (outcomes,) = pool.score(spec("empties"), [call])
    assert outcomes == [Outcome(None, "error", "returned 0 values for 2 rollouts")] * 2


def test_not_a_list(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("a_number"), "a")
    assert error_of(outcomes[0]).startswith("returned float '1.0', not a list of 1 numbers")


def test_odd_values(pool: FunctionPool) -> None:
    expected = {
        "nan": Outcome(None, "nonfinite", "returned nan"),
        "inf": Outcome(None, "nonfinite", "returned -inf"),
        "none": Outcome(None, "not_applicable"),
        "text": Outcome(None, "error", "returned str '1.0', not a number"),
        "list": Outcome(None, "error", "returned list, not a number"),
        "true": Outcome(1.0, "ok"),
        "int": Outcome(7.0, "ok"),
        "huge": Outcome(None, "nonfinite", "returned a number too large for a float"),
        "float32": Outcome(0.5, "ok"),
        "array0d": Outcome(3.0, "ok"),
        "array1d": Outcome(None, "error", "returned ndarray of shape (1,), not a number"),
    }
    outcomes = score_one(pool, spec("odd_values"), *expected)
    assert dict(zip(expected, outcomes, strict=True)) == expected


# ---- what a function may be and gets ----


@pytest.mark.parametrize(
    ("function", "values"),
    [
        ("an_array", [0.0, 1.0, 2.0]),
        ("a_tensor", [0.0, 1.0, 2.0]),
        ("a_list_of_tensors", [0.25, 0.25, 0.25]),
        ("waits", [2.0, 2.0, 2.0]),
        ("an_object", [5.0, 5.0, 5.0]),
    ],
)
def test_results_that_are_fine(pool: FunctionPool, function: str, values: list[float]) -> None:
    outcomes = score_one(pool, spec(function, timeout_s=120.0), "a", "b", "c")
    assert outcomes == [Outcome(value, "ok") for value in values]


def test_trl_style_function_gets_messages_columns_ids_and_arguments(pool: FunctionPool) -> None:
    call = GroupCall(
        prompts=[[{"role": "user", "content": "1+1="}]] * 2,
        completions=[[{"role": "assistant", "content": text}] for text in ("2", "3")],
        completion_ids=[[5, 6], [5, 6, 7]],
        columns={"answer": ["1+1=2", "1+1=2"], "level": ["easy", "easy"]},
    )
    function = spec("trl_style", bonus=0.5)
    pool.check(function, columns=["answer", "level"])
    (outcomes,) = pool.score(function, [call])
    assert [o.value for o in outcomes] == [3.5, 3.5]  # right 1 + bonus 0.5 + 2 ids; wrong 0 + 0.5 + 3 ids


def test_an_event_loop_lives_as_long_as_its_worker(pool: FunctionPool) -> None:
    # Three calls in two workers: one of them gets two, and what its module keeps is bound to the first loop.
    results = list(pool.score(spec("waits_for_a_client"), [group("a", "b")] * 3))
    assert results == [[Outcome(2.0, "ok")] * 2] * 3


def test_trl_s_own_keywords_are_there(pool: FunctionPool) -> None:
    call = GroupCall(["p"] * 2, ["a", "bcd"], [[1]] * 2, {}, iteration=4)
    pool.check(spec("needs_trl_keywords"), columns=[])
    (outcomes,) = pool.score(spec("needs_trl_keywords"), [call])
    assert [outcome.value for outcome in outcomes] == [41.0, 43.0]  # 10 x iteration + length, also one by one
    (outcomes,) = pool.score(spec("logs_by_keyword"), [call])
    assert [outcome.value for outcome in outcomes] == [1.0, 1.0]
    (outcomes,) = pool.score(spec("logs_too_much"), [call])
    error = "TypeError: log_metric() takes 2 positional arguments but 3 were given"
    assert [error_of(outcome).startswith(error) for outcome in outcomes] == [True, True]
    (outcomes,) = pool.score(spec("needs_max_steps"), [call])
    error = "AttributeError: trainer_state has no max_steps here, only global_step: the iteration, from 0"
    assert [error_of(outcome).startswith(error) for outcome in outcomes] == [True, True]


def test_a_factory_in_place_of_a_function_is_named(pool: FunctionPool) -> None:
    outcomes = score_one(pool, spec("factory"), "a", "b")
    assert error_of(outcomes[0]) == (
        "returned function, not a list of 2 numbers; does it make reward functions? call it in a file of"
        " yours, and name what it returns"
    )


def test_groups_come_back_in_order_and_few_are_read_ahead(pool: FunctionPool) -> None:
    num_read = 0

    def groups() -> Iterator[GroupCall]:
        nonlocal num_read
        for size in range(20):
            num_read += 1
            yield group("x" * size)

    results = pool.score(spec("length"), groups())
    assert next(results) == [Outcome(0.0, "ok")]
    assert num_read == 4  # 2 workers x 2 calls
    assert [outcome.value for (outcome,) in results] == list(range(1, 20))


def test_large_groups_pass(pool: FunctionPool) -> None:
    # A pipe holds 64 KiB: larger calls must neither deadlock nor be cut.
    outcomes = list(pool.score(spec("length"), [group("x" * 3_000_000, "y")] * 6))
    assert outcomes == [[Outcome(3_000_000.0, "ok"), Outcome(1.0, "ok")]] * 6


def test_calls_cannot_change_each_others_data(pool: FunctionPool) -> None:
    call = group("a", "b", answer=["1", "2"])
    list(pool.score(spec("mutates"), [call]))
    assert call.columns == {"answer": ["1", "2"]}


def test_printing_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    pool = FunctionPool(ROOT, num_workers=1)  # started here, so that its output goes to capfd
    assert score_one(pool, spec("prints"), "a") == [Outcome(0.0, "ok")]
    pool.close()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "printed by a reward function\n" in captured.err
    assert "echoed by a reward function\n" in captured.err


def test_workers_do_not_import_torch() -> None:
    pool = FunctionPool(ROOT, num_workers=1)
    assert score_one(pool, spec("torch_is_imported"), "a") == [Outcome(0.0, "ok")]
    pool.close()


def test_this_module_does_not_import_torch() -> None:
    code = "import sys, grpo.score.functions; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_edited_function_is_imported_anew(tmp_path: Path) -> None:
    source = tmp_path / "reward.py"
    source.write_text("def f(completions): return [1.0 for _ in completions]\n")
    pool = FunctionPool(tmp_path, num_workers=1)
    assert score_one(pool, spec("f"), "a") == [Outcome(1.0, "ok")]
    source.write_text("def f(completions): return [2.0 for _ in completions]\n")  # same size, same second
    assert score_one(pool, spec("f"), "a") == [Outcome(2.0, "ok")]
    pool.close()


def test_pool_survives_a_worker_killed_between_calls(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("import os\ndef pid(completions): return [os.getpid()]\n")
    pool = FunctionPool(tmp_path, num_workers=1)
    (first,) = score_one(pool, spec("pid"), "a")
    assert first.value is not None
    os.kill(int(first.value), signal.SIGKILL)
    (second,) = score_one(pool, spec("pid"), "a")
    assert second.status == "ok"
    assert second.value != first.value
    pool.close()


def test_a_worker_ends_by_a_signal_without_a_word(tmp_path: Path) -> None:
    """A handler of Python's is gone when Python ends, and a signal then is a traceback on stderr."""
    source = "import signal\ndef f(completions): return [float(signal.getsignal(15) == signal.SIG_DFL)]\n"
    (tmp_path / "reward.py").write_text(source)
    with closing(FunctionPool(tmp_path, num_workers=1)) as pool:
        assert score_one(pool, spec("f"), "a") == [Outcome(1.0, "ok")]


def test_a_slow_import_is_not_counted(tmp_path: Path) -> None:
    source = "import time\ntime.sleep(1.5)\ndef f(completions): return [1.0]\n"
    (tmp_path / "reward.py").write_text(source)
    pool = FunctionPool(tmp_path, num_workers=2)
    outcomes = list(pool.score(spec("f", timeout_s=1.0), [group("a")] * 4))
    assert outcomes == [[Outcome(1.0, "ok")]] * 4
    pool.close()


def test_closing_ends_a_busy_pool() -> None:
    pool = FunctionPool(ROOT, num_workers=1)
    pool.check(spec("hangs"))
    results = pool.score(spec("hangs", timeout_s=300.0), [group("a"), group("bad"), group("bad")])
    assert next(results) == [Outcome(1.0, "ok")]
    results.close()  # type: ignore[attr-defined]  # a generator
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 30
