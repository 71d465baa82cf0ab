import json
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.score import rewards
from grpo.score.functions.built_in import (
    BUILT_IN,
    Text,
    exact_answer,
    final_number,
    gsm8k,
    length_penalty,
    math_verify,
    regex_format,
)
from grpo.score.functions.call import GroupCall
from grpo.score.functions.pool import FunctionPool

GSM8K = Path(__file__).parents[2] / "data" / "gsm8k" / "train.jsonl"


def gsm8k_answers() -> list[str]:
    return [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def test_the_built_in_functions_have_their_own_names() -> None:
    assert {name: function.__name__ for name, function in BUILT_IN.items()} == {n: n for n in BUILT_IN}


def test_exact_answer_ignores_surrounding_whitespace_only() -> None:
    responses = [" 42\n", "4 2", "42", "", "42"]
    assert exact_answer(["p"] * 5, responses, ["42", "42", " 42", "42", None]) == [1.0, 0.0, 1.0, 0.0, None]


def test_exact_answer_reads_chat_completions_and_ignores_other_columns() -> None:
    completions: list[Text] = [
        [{"role": "assistant", "content": "42"}],
        [{"role": "assistant", "content": None}],
    ]
    assert exact_answer(["p"] * 2, completions, ["42", "42"], level=[1, 2]) == [1.0, 0.0]


# ---- gsm8k ----


def test_gsm8k_reference_solutions_are_right() -> None:
    answers = gsm8k_answers()
    assert len(answers) == 64
    assert gsm8k(answers, answers, answers) == [1.0] * 64


def test_gsm8k_reference_solutions_with_another_marker_or_none_are_right() -> None:
    answers = gsm8k_answers()
    stated = [answer.replace("####", "The answer is $") + ".00." for answer in answers]
    boxed = [answer.replace("#### ", "So it is \\boxed{") + "} in 3 steps." for answer in answers]
    bare = [answer.replace("####", "") for answer in answers]
    assert gsm8k(answers, stated, answers) == [1.0] * 64
    assert gsm8k(answers, boxed, answers) == [1.0] * 64
    assert gsm8k(answers, bare, answers) == [1.0] * 64


def test_gsm8k_altered_numbers_are_wrong() -> None:
    answers = gsm8k_answers()
    # A further digit before, behind the point, or a sign: 72 becomes 172, 72.1, -72.
    for before, behind in (("1", ""), ("", ".1"), ("-", "")):
        altered = [answer.replace("#### ", f"#### {before}") + behind for answer in answers]
        assert gsm8k(answers, altered, answers) == [0.0] * 64


def test_gsm8k_answer_without_a_marker_is_itself_the_number() -> None:
    responses = ["It is 1,234.", "It is 1234", "1235", "no idea"]
    assert gsm8k(["p"] * 4, responses, ["1,234", "$1,234.00", "1234", "1234"]) == [1.0, 1.0, 0.0, 0.0]


def test_gsm8k_without_an_answer_does_not_apply() -> None:
    assert gsm8k(["p"], ["18"], [None]) == [None]


def test_gsm8k_answer_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^the answer has no number: 'a dozen #### none'$"):
        gsm8k(["p"], ["18"], ["a dozen #### none"])
    with pytest.raises(ValueError, match=r"^the answer has a number that is read as none: '#### 3:30'$"):
        gsm8k(["p"], ["18"], ["#### 3:30"])


@pytest.mark.parametrize(
    ("response", "number"),
    [
        # how a number is written
        ("18", "18"),
        ("She makes $18.", "18"),
        ("She makes $ 18.00 a day!", "18"),
        ("18 dollars", "18"),
        ("18%", "18"),
        ("18\\%", "18"),
        ("**18**", "18"),
        ("it is 1,234,567.50 in all", "1234567.5"),
        ("1{,}234", "1234"),
        (".5", "0.5"),
        ("0018", "18"),
        ("2 + 3 = -5", "-5"),
        ("\u22125 degrees", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("version 3.14.", "3.14"),
        # markers come before the last number
        ("#### 18\nin 3 days", "18"),
        ("####18", "18"),
        ("#### $1,080.00", "1080"),
        ("#### -7", "-7"),
        ("#### **18** dollars for 3 days", "18"),
        ("so \\boxed{18} after 3 days", "18"),
        ("so $\\boxed{\\$1{,}018}$ after 3 days", "1018"),
        ("\\boxed{\\text{18 eggs}} for 3", "18"),
        ("\\boxed{x = 18} for 3", "18"),
        ("The answer is 18. That took 3 steps.", "18"),
        ("The final answer is: $18.50$ for 3.", "18.5"),
        ("**Answer:** 18 eggs in 3 days", "18"),
        ("Answer = 18 (of 20)", "18"),
        ("The answer is 3 * 6 = 18 dollars. Of 20.", "18"),
        ("The answer is 18. Check: 20 - 2 = 9 * 2", "18"),
        ("The final answer is:\n\n18\n\nin 3 days", "18"),
        ("THE ANSWER IS 18, not 20", "18"),
        ("The answer is \\boxed{18}. It took 3 days", "18"),
        # the last marker with a number wins
        ("#### 17\n#### 18", "18"),
        ("The answer is 17. No: the answer is 18. Took 3.", "18"),
        ("#### 2. Add them\nThe answer is 18 for 3.", "18"),
        ("#### Step 1\nadd\n#### Step 2\n9 + 9 = 18", "18"),
        ("#### 18\nThe answer is clear.", "18"),
        ("\\boxed{18} and \\boxed{} and 3", "18"),
        # the answers of others do not count
        ("It answered 3 times, 18", "18"),
    ],
)
def test_final_number(response: str, number: str) -> None:
    assert final_number(response) == Decimal(number)


@pytest.mark.parametrize("response", ["", "no number", "####", "\\boxed{}", "the answer is", "-", "$,."])
def test_final_number_of_a_response_without_one(response: str) -> None:
    assert final_number(response) is None


@pytest.mark.parametrize(
    "piece",
    [
        *["1,", "answer: ", "\\boxed{", "####", "1,111", "-", "$", ".", "answer is = ", "answer is \n"],
        *[
            "1 ",
            "\\frac{",
            "^{",
            "1*",
            "²",
            "\\text{",
            "1k",
            "million ",
            "}{",
            " and ",
            "½",
            "1/",
            "#### nan ",
        ],
    ],
)
def test_final_number_is_quick_on_hostile_responses(piece: str) -> None:
    # It would take minutes if the search were quadratic, and takes a tenth of a second.
    began = time.process_time()
    final_number(piece * 50_000 + "7")
    assert time.process_time() - began < 5


# ---- regex_format ----


def test_regex_format_is_a_full_match_over_lines() -> None:
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    responses = ["<think>a\nb</think>\n<answer>1</answer>", "<think>a</think><answer>1</answer> bye", ""]
    assert regex_format(["p"] * 3, responses, pattern=pattern, answer=["1"] * 3) == [1.0, 0.0, 0.0]


def test_regex_format_finds_anywhere_with_dots() -> None:
    assert regex_format(["p"], ["so\n#### 5\nbye"], pattern=r".*#### \d+.*") == [1.0]


def test_regex_format_refuses_a_broken_pattern() -> None:
    with pytest.raises(ValueError, match=r"^pattern is not a regular expression: .*position 0: '\('$"):
        regex_format([], [], pattern="(")


# ---- length_penalty ----


def test_length_penalty_is_zero_then_linear_then_minus_one() -> None:
    # Free up to 100 - 40 = 60; 70 is 10 of 40 into the buffer, 80 is 20 of 40, 100 and above are all of it.
    ids = [[1] * length for length in (0, 60, 70, 80, 100, 150)]
    rewards = length_penalty(ids, max_tokens=100, buffer_tokens=40, completions=["r"] * 6)
    assert rewards == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert "-0.0" not in map(str, rewards)


@pytest.mark.parametrize(("max_tokens", "buffer_tokens"), [(100, 0), (100, 101), (0, 0), (100, -1)])
def test_length_penalty_refuses_an_impossible_buffer(max_tokens: int, buffer_tokens: int) -> None:
    message = f"^needs 0 < buffer_tokens <= max_tokens, found {buffer_tokens} and {max_tokens}$"
    with pytest.raises(ValueError, match=message):
        length_penalty([], max_tokens=max_tokens, buffer_tokens=buffer_tokens)


# ---- math_verify ----


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        (r"\boxed{0.5}", "1/2", 1.0),
        (r"I get \boxed{\frac{1}{2}}.", "0.5", 1.0),
        ("3 + 4 = 7", "7", 1.0),  # the last number
        ("7, or rather 8", "7", 0.0),
        (r"The final answer is $x^2 + 2x + 1$. I hope it is correct.", "(x+1)^2", 1.0),
        (r"$\{2, 1\}$", r"\{1,2\}", 1.0),  # a set has no order,
        (r"$(2, 1)$", "(1,2)", 0.0),  # a pair has
        (r"\boxed{18}", "She sells 16 - 3 - 4 = 9 eggs.\n#### 18", 1.0),  # as in GSM8K
        (r"\boxed{18}", r"$18$", 1.0),
        ("no idea", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_verify_compares_as_mathematics(response: str, answer: str, value: float) -> None:
    assert math_verify(["p"], [response], [answer]) == [value]


def test_math_verify_without_an_answer() -> None:
    assert math_verify(["p"] * 2, ["7", "7"], [None, "7"]) == [None, 1.0]
    with pytest.raises(ValueError, match=r"^the answer is not mathematics: '#### '$"):
        math_verify(["p"], ["7"], ["#### "])


@pytest.mark.parametrize(
    ("response", "part"),
    [
        *[
            ("2.5 million", "2.5"),
            ("1.234.567", "1.234"),
            ("3:30", "3"),
            ("10²", "10"),
            ("3½", "3"),
            ("3k", "3"),
        ],
        *[
            ("1 3", "3"),
            ("2024-05-01", "2024"),
            ("1e3", "1"),
            ("2 dozen", "2"),
            (r"\boxed{2\text{ dozen}}", "2"),
        ],
        *[("3/4", "3"), ("10^6", "10"), ("1,23", "1"), ("1,23", "23"), (r"\boxed{2.5 million}", "2.5")],
    ],
)
def test_math_verify_pays_no_part_of_a_number(response: str, part: str) -> None:
    assert math_verify(["p"], [response], [part]) == [0.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\uff11\uff18", "18"),
        ("\u22125", "-5"),
        ("1 000", "1000"),
        ("50%", "50"),
        ("2+2", "4"),
        ("it took 30 days, so 3", "3"),
    ],
)
def test_math_verify_pays_what_is_whole(response: str, answer: str) -> None:
    assert math_verify(["p"], [response], [answer]) == [1.0]


# ---- called by functions of the user's ----


def test_the_public_name_has_all_of_them_and_the_same() -> None:
    assert {name: getattr(rewards, name) for name in rewards.__all__} == BUILT_IN


def test_a_function_of_the_users_calls_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(
        "from grpo.score.rewards import gsm8k\n\n\n"
        "def half(prompts, completions, answer, **columns):\n"
        "    return [value / 2 for value in gsm8k(prompts, completions, answer)]\n"
    )
    reward = RewardConfig.model_validate({"function": "own:half"})
    group = GroupCall(["p"] * 2, ["#### 7", "#### 8"], [[1], [2]], {"answer": ["7", "7"]}, iteration=0)
    with closing(FunctionPool(tmp_path, 1)) as pool:
        pool.check(reward, ["answer"])
        found = [outcome.value for outcomes in pool.score(reward, [group]) for outcome in outcomes]
    assert found == [0.5, 0.0]
