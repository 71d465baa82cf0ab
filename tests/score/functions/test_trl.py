"""TRL's own reward functions, named in the configuration as they are, in real workers.

What each must give is worked out from its documentation, not by calling it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.errors import UsageError
from grpo.score.functions.call import GroupCall
from grpo.score.functions.pool import FunctionPool
from grpo.score.functions.source import source_sha256

# A factory's reward function is made in the user's own file: two lines.
REWARD = """\
from trl.rewards import get_soft_overlong_punishment
overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FunctionPool]:
    root = tmp_path_factory.mktemp("trl")
    (root / "reward.py").write_text(REWARD)
    pool = FunctionPool(root, num_workers=1)
    yield pool
    pool.close()


def values(
    pool: FunctionPool, function: str, responses: list[str], solution: str = "7"
) -> list[float | None]:
    """Of one group of chat rollouts, as `grpo score` calls it; a response has a token per character."""
    spec = RewardConfig(function=function, timeout_s=120.0)
    pool.check(spec, ["prompt_id", "answer", "solution"])
    num = len(responses)
    call = GroupCall(
        prompts=[[{"role": "user", "content": "3+4="}]] * num,
        completions=[[{"role": "assistant", "content": text}] for text in responses],
        completion_ids=[list(text.encode()) for text in responses],
        columns={"prompt_id": [0] * num, "answer": [None] * num, "solution": [solution] * num},
    )
    (outcomes,) = pool.score(spec, [call])
    assert {outcome.status for outcome in outcomes} <= {"ok", "not_applicable"}
    return [outcome.value for outcome in outcomes]


@pytest.mark.slow
def test_accuracy_reward(pool: FunctionPool) -> None:
    responses = [r"I get \boxed{7}", r"I get \boxed{8}", "7"]  # it asks for LaTeX
    assert values(pool, "trl.rewards:accuracy_reward", responses) == [1.0, 0.0, 0.0]
    # A reference that is no mathematics: the reward does not apply.
    assert values(pool, "trl.rewards:accuracy_reward", responses, "north") == [None, None, None]


@pytest.mark.slow
def test_reasoning_accuracy_reward(pool: FunctionPool) -> None:
    responses = [r"<think>\boxed{8}</think> \boxed{7}", r"<think>\boxed{7}</think>", r"\boxed{7}"]
    assert values(pool, "trl.rewards:reasoning_accuracy_reward", responses) == [1.0, 0.0, 0.0]


@pytest.mark.slow
def test_think_format_reward(pool: FunctionPool) -> None:
    responses = ["<think>\nhm\n</think>\n7", "7", "<think>hm"]
    assert values(pool, "trl.rewards:think_format_reward", responses) == [1.0, 0.0, 0.0]


@pytest.mark.slow
def test_what_a_factory_makes_in_a_file_of_one_s_own(pool: FunctionPool) -> None:
    # Free up to 10 - 4 = 6 tokens, then down by 1/4 a token, and -1 above 10.
    responses = ["x" * 6, "x" * 8, "x" * 10, "x" * 11]
    assert values(pool, "reward:overlong", responses) == [0.0, -0.5, -1.0, -1.0]


@pytest.mark.slow
def test_a_column_that_is_missing_is_named(pool: FunctionPool) -> None:
    with pytest.raises(
        UsageError, match="needs solution: not in arguments, and no column; the columns are: a"
    ):
        pool.check(RewardConfig(function="trl.rewards:accuracy_reward"), ["answer"])


def test_the_source_is_found_without_importing_trl(tmp_path: Path) -> None:
    assert len(source_sha256("trl.rewards:accuracy_reward", tmp_path)) == 64
