import math
from pathlib import Path
from typing import Any

from tests.inspect.report.runs import make_run, row

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.inspect.report import rollouts
from grpo.inspect.report.rollouts import MAX_ROLLOUTS


def read(run: ActiveRun, max_rollouts: int = MAX_ROLLOUTS, max_tokens: float = math.inf) -> dict[str, Any]:
    block, _ = sql.snapshot(
        [run], lambda connection: rollouts.read(connection, run, max_rollouts, max_tokens)
    )
    return block


def column(block: dict[str, Any], name: str) -> list[Any]:
    return [rollout[name] for rollout in block["rollouts"]]


def text(block: dict[str, Any], rollout: int) -> list[str]:
    return [block["texts"][place] for place in block["tokens"][rollout]]


def test_a_rollout_has_what_it_was_and_what_it_got(hand: ActiveRun) -> None:
    block = read(hand)
    assert block["rollouts"][3] == {
        "iteration": 0,
        "group_id": 1,
        "sample_id": 1,
        "prompt_id": 1,
        "finish_reason": "stop",
        "reward": None,
        "advantage": None,
        "keep": False,
        "reason": "unscored",
        "rewards": [
            {"name": "right", "value": 0.0, "weight": 1.0, "status": "ok", "error": "no <b>number</b>"},
            {"name": "short", "value": None, "weight": 1.0, "status": "error", "error": "no <b>number</b>"},
        ],
    }
    assert column(block, "iteration") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert column(block, "sample_id") == [0, 1] * 4
    assert column(block, "advantage")[:3] == [1, -1, 0]
    assert column(block, "finish_reason") == [
        "stop", "stop", "length", "stop", "stop", "stop", "stop", "length",
    ]  # fmt: skip
    assert block["prompts"] == {number: {"prompt": f"prompt {number}", "answer": None} for number in range(3)}


def test_a_token_is_a_place_among_the_texts(hand: ActiveRun) -> None:
    block = read(hand)
    assert [len(places) for places in block["tokens"]] == [2, 4, 2, 2, 3, 3, 3, 3]
    assert text(block, 1) == ["a", "b", "c", "<|endoftext|>"]
    assert [block["texts"][place] for place in block["special"]] == ["<|endoftext|>"]
    assert block["texts"][0] in ("a", "<|endoftext|>")  # the most frequent, eight times each
    assert (block["tokens_absent"], "response" in block["rollouts"][0]) == ("", False)


def test_logprobs_and_ratios_find_their_tokens(tmp_path: Path) -> None:
    rows = [
        row(0, 0, 0, "a", old_logprobs=[-1.26, -0.2512], policy_logprobs=[-1.26, -0.05]),
        row(0, 0, 1, "b", policy_logprobs=None),
        row(
            0, 1, 0, "c", old_logprobs=[-30.0, 0.0], policy_logprobs=[-40.0, 0.0], response_mask=[True, False]
        ),
    ]
    block = read(make_run(tmp_path, reversed(rows)))  # on disk in another order than by key
    assert [text(block, rollout)[0] for rollout in range(3)] == ["a", "b", "c"]
    # In hundredths; beyond 1 in tens of them. The last token was not sampled by the policy.
    assert block["logprobs"] == [[130, 25], [50, 50], [3000, None]]
    # In thousandths: -0.05 + 0.2512 = 0.2012; no update read the second.
    assert block["log_ratios"] == [[0, 201], [None, None], [-10000, None]]


def test_without_a_tokenizer_there_is_the_response(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(0, 0, 0, "äb"), row(0, 0, 1, "c")])
    (tmp_path / "model" / "tokenizer.json").unlink()
    block = read(run)
    assert block["tokens_absent"] == "no tokenizer.json is where the checkpoints of this run were"
    assert column(block, "response") == ["äb", "c"]
    assert (block["tokens"], block["logprobs"], block["log_ratios"]) == (None, None, None)


def test_only_what_was_chosen_is_read(hand: ActiveRun) -> None:
    assert column(read(hand, 4), "iteration") == [1] * 4
    block = read(hand, 2)
    assert column(block, "group_id") == [0, 0]
    assert list(block["prompts"]) == [0]
    block = read(hand, 0)
    assert (block["rollouts"], block["texts"], block["prompts"]) == ([], [], {})
