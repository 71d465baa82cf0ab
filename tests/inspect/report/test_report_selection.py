import math

import pytest

from grpo.errors import UsageError
from grpo.inspect.report.rollouts import MAX_ROLLOUTS, MAX_TOKENS, choose, limits


def sizes(count: int, rollouts: int = 10, tokens: int = 100) -> list[dict[str, int]]:
    return [{"iteration": n, "groups": 5, "rollouts": rollouts, "tokens": tokens} for n in range(count)]


def test_all_of_a_run_that_fits() -> None:
    chosen = choose(sizes(3), 30, 300)
    assert (chosen.iterations, chosen.left_out) == ([0, 1, 2], "")
    assert chosen.groups >= 5


def test_iterations_are_evenly_spaced_with_the_first_and_the_newest() -> None:
    chosen = choose(sizes(11), 39, math.inf)  # room for three of ten rollouts each
    assert chosen.iterations == [0, 5, 10]
    assert chosen.left_out == "30 of 110 rollouts are in the file: all of 3 of 11 iterations, evenly spaced"


def test_tokens_count_too() -> None:
    assert choose(sizes(11), 1000, 200).iterations == [0, 10]
    assert choose(sizes(11), 1000, 199).iterations == [10]


def test_where_not_even_the_newest_iteration_fits_its_first_groups_are_taken() -> None:
    chosen = choose(sizes(4), 5, math.inf)  # five of ten rollouts: two of five groups
    assert (chosen.iterations, chosen.groups) == ([3], 2)
    assert chosen.left_out == "4 of 40 rollouts are in the file: the first 2 groups of iteration 3"
    assert choose(sizes(4), 1, math.inf).iterations == []  # not even one group


def test_no_rollouts_and_no_run() -> None:
    assert choose(sizes(4), 0, math.inf).left_out == "0 of 40 rollouts are in the file"
    assert choose([], *limits(None, 1)).left_out == ""


def test_a_number_given_lifts_the_limit_on_tokens_and_runs_share_it() -> None:
    assert limits(None, 2) == (MAX_ROLLOUTS / 2, MAX_TOKENS / 2)
    assert limits(7, 2) == (3, math.inf)
    with pytest.raises(UsageError, match=r"^--rollouts -1: expected a number of rollouts, 0 or more$"):
        limits(-1, 1)
