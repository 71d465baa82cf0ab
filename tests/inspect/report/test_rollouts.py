import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.inspect.report.runs import make_run, row

from grpo import sql
from grpo.artifacts import Run
from grpo.inspect.report import rollouts
from grpo.inspect.report.selection import Limits

ALL = Limits()


def read(run: Run, limit: Limits = ALL) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    block, _ = sql.consult([run], lambda connection: rollouts.read(connection, run, limit))
    return block


def logprob(code: int) -> float:
    return -25 * (int(code) / 254) ** 2


def ratio(code: int) -> float:
    steps = int(code) - 127
    return math.exp(math.copysign(4 * (steps / 127) ** 2, steps))


def test_a_row_of_each_column_is_the_rollout(hand: Run) -> None:
    document, columns = read(hand)
    assert document["rollouts"] == 8
    assert columns["iteration"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert columns["sample_id"].tolist() == [0, 1] * 4
    assert document["prompts"] == ["prompt 0", "prompt 1", "prompt 2"]
    assert columns["prompt"].tolist() == [0, 0, 1, 1, 0, 0, 2, 2]
    assert columns["advantage"][:3].tolist() == [1, -1, 0]
    assert np.isnan(columns["reward"][3])
    assert columns["keep"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert [document["reason"][code] for code in columns["reason"][3:4]] == ["unscored"]
    assert columns["reason"][0] == rollouts.NO_CODE
    finish = [document["finish_reason"][code] for code in columns["finish_reason"]]
    assert finish == ["stop", "stop", "length", "stop", "stop", "stop", "stop", "length"]


def test_rewards_stand_by_name_with_what_went_wrong(hand: Run) -> None:
    document, columns = read(hand)
    assert [reward["name"] for reward in document["rewards"]] == ["right", "short"]
    assert columns["value_0"].tolist() == [1, 0, 0, 0, 1, 1, 1, 0]
    assert columns["value_1"][:3].tolist() == [3, 1, 2]
    assert np.isnan(columns["value_1"][3])
    short = document["rewards"][1]
    assert [short["status"][code] for code in columns["status_1"][2:4]] == ["ok", "error"]
    assert short["error"][columns["error_1"][3]] == "no <b>number</b>"


def test_tokens_are_lengths_in_one_text(hand: Run) -> None:
    document, columns = read(hand)
    assert columns["tokens"].tolist() == [2, 4, 2, 2, 3, 3, 3, 3]
    assert columns["bytes"].tolist() == [14, 16, 14, 14, 15, 15, 15, 15]  # <|endoftext|> has 13
    assert columns["text"].tobytes().startswith(b"a<|endoftext|>abc<|endoftext|>a<|endoftext|>")
    assert columns["sizes"][:6].tolist() == [1, 13, 1, 1, 1, 13]
    assert (document["special"], document["tokens_absent"]) == (["<|endoftext|>", "<|pad|>"], "")


def test_logprobs_and_ratios_find_their_tokens(tmp_path: Path) -> None:
    rows = [
        row(0, 0, 0, "a", old_logprobs=[-1.0, -0.25], policy_logprobs=[-1.0, -0.05]),
        row(0, 0, 1, "b", policy_logprobs=None),
        row(
            0, 1, 0, "c", old_logprobs=[-30.0, 0.0], policy_logprobs=[-40.0, 0.0], response_mask=[True, False]
        ),
    ]
    _, columns = read(make_run(tmp_path, reversed(rows)))  # on disk in another order than by key
    assert columns["text"].tobytes()[::14] == b"abc"
    found = [logprob(code) for code in columns["logprob"][:5]]
    assert found == pytest.approx([-1, -0.25, -0.5, -0.5, -25], abs=0.02)  # -30 is beyond the range
    assert columns["logprob"][5] == rollouts.NO_CODE  # not sampled by the policy
    # exp(0) = 1, exp(0.2) = 1.2214; no update read the second; exp(-10) is beyond exp(-4).
    assert [ratio(code) for code in columns["ratio"][:2]] == pytest.approx([1, 1.2214], rel=0.007)
    assert columns["ratio"][2:4].tolist() == [rollouts.NO_CODE] * 2
    assert ratio(columns["ratio"][4]) == pytest.approx(np.exp(-4))


def test_what_a_byte_keeps_of_a_logprob_and_of_a_ratio() -> None:
    exact = -np.linspace(0, 25, 10_001, dtype=np.float32)
    kept = np.array([logprob(code) for code in rollouts.quantised_logprobs(exact)])
    error = np.abs(kept - exact)
    assert error.max() <= 0.1
    assert error[exact > -1].max() <= 0.02
    differences = np.linspace(-4, 4, 10_001, dtype=np.float32)
    kept = np.array([ratio(code) for code in rollouts.quantised_ratios(differences)])
    relative = np.abs(kept / np.exp(differences) - 1)
    assert relative[np.abs(differences) < np.log(1.2)].max() <= 0.007
    assert rollouts.quantised_ratios(np.array([0, np.nan], np.float32)).tolist() == [127, 255]


def test_without_a_tokenizer_there_is_the_response(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(0, 0, 0, "äb"), row(0, 0, 1, "c")])
    (tmp_path / "model" / "tokenizer.json").unlink()
    document, columns = read(run)
    assert document["tokens_absent"] == "no tokenizer.json is where the checkpoints of this run were"
    assert (columns["text"].tobytes(), columns["bytes"].tolist()) == ("äbc".encode(), [3, 1])
    assert "sizes" not in columns


def test_only_what_was_chosen_is_read(hand: Run) -> None:
    document, columns = read(hand, Limits(4, None))
    assert (document["rollouts"], set(columns["iteration"].tolist())) == (4, {1})
    document, columns = read(hand, Limits(2, None))
    assert columns["group_id"].tolist() == [0, 0]
    assert document["prompts"] == ["prompt 0"]
    document, columns = read(hand, Limits(0, None))
    assert (document["rollouts"], len(columns["text"])) == (0, 0)
