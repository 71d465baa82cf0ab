"""One prompt as a person reads it, from rollouts written by hand."""

from typing import Any

import pytest
from rich.console import Console

from grpo.inspect.show.choice import pairs_of
from grpo.inspect.show.page import print_over_time, print_pairs, print_prompt


def draw(iteration: int, responses: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """The rollouts of a group, of (response, reward) each."""
    common = {
        "run": "r",
        "iteration": iteration,
        "group_id": 0,
        "prompt_id": 4,
        "prompt": "1+1=",
        "answer": "",
    }
    mean = sum(reward for _, reward in responses) / len(responses)
    texts = [{"response": text, "reward": reward, "response_tokens": 2} for text, reward in responses]
    return [{**common, **text, "sample_id": n, "group_mean": mean} for n, text in enumerate(texts)]


@pytest.mark.parametrize("characters", [5, 24, 3000])
def test_long_responses_are_cut_off_and_numbers_are_not(characters: int) -> None:
    console = Console(width=90)
    with console.capture() as captured:
        print_over_time(console, [draw(n, [("a" * characters, 1.0), ("b c", 0.0)]) for n in (3, 40)])
    lines = [line.split() for line in captured.get().splitlines()]
    assert lines[3][:6] == ["iteration", "group", "reward", "tokens", "different", "responses,"]
    for line, iteration in zip(lines[5:7], ("3", "40"), strict=True):
        assert line[:8] == [iteration, "0", "+0.500", "2.0", "2", "1", "x", line[7]]
        assert line[7].startswith("aaaaa")
    assert lines[7] == []  # a line for each draw


def test_a_group_of_one_has_no_deviation() -> None:
    console = Console(width=80)
    for deviation, shown in ((None, "reward 1.000 ─"), (0.0, "reward 1.000 ± 0.000 ─")):
        with console.capture() as captured:
            print_prompt(console, {**draw(3, [("2", 1.0)])[0], "group_std": deviation})
        assert shown in captured.get()


def test_equal_responses_are_counted() -> None:
    before = draw(3, [("2", 1.0), ("11", 0.0), ("2", 1.0), ("", 0.0)])
    after = draw(40, [("2", 1.0)] * 4)
    pairs = pairs_of([before], [after])
    console = Console(width=80)
    with console.capture() as captured:
        print_pairs(console, pairs)
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "iteration 3 iteration 40" in lines
    assert "reward 0.500 2.0 tokens reward 1.000 2.0 tokens" in lines
    assert lines[-4:-1] == ["2 x +1.000 2 4 x +1.000 2", "1 x +0.000 (empty)", "1 x +0.000 11"]
