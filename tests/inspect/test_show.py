import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_cli import HOSTILE, SHOWN, hostile_rollouts
from tests.conftest import Grpo
from tests.inspect.report import runs

from grpo.errors import InputError
from grpo.inspect.show.choice import add_tokens

REWARDS = 'score.rewards=[{function: "reward:code"}, {function: "reward:length", weight: 0}]'


@pytest.fixture
def inside(complete: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished project itself; the test reads it only."""
    monkeypatch.chdir(complete)
    return complete


def rows_of(grpo: Grpo, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = grpo("show", *arguments, "--json")
    assert (code, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


# Pages and order


def test_a_page_says_where_it_is_and_what_shows_the_next(inside: Path, grpo: Grpo) -> None:
    code, out, err = grpo("show", "--iteration", "0", "--groups", "2")
    assert (code, err) == (0, "")
    assert out.endswith("groups 1-2 of 3; --page 2\n")
    assert "iteration 0  group 1  prompt " in out
    code, out, _ = grpo("show", "--iteration", "0", "--groups", "2", "--page", "2")
    assert out.endswith("groups 3 of 3\n")
    assert "iteration 0  group 2  prompt " in out
    assert "group 0 " not in out
    assert "--page" not in grpo("show", "--iteration", "0", "--groups", "3")[1]
    assert [row["group_id"] for row in rows_of(grpo, "--iteration", "0", "--groups", "1", "--page", "2")] == [
        1,
        1,
    ]


def test_sorted_by_a_number_or_a_reward(inside: Path, grpo: Grpo) -> None:
    whole = rows_of(grpo, "--iteration", "0")
    assert [(row["group_id"], row["sample_id"]) for row in whole] == [
        (g, s) for g in range(3) for s in range(2)
    ]
    for sort, column in (("reward", "reward"), ("code", "reward"), ("tokens", "response_tokens")):
        for flag, sign in (([], -1), (["--reverse"], 1)):
            found = rows_of(grpo, "--iteration", "0", "--sort", sort, *flag)
            groups = [row["group_id"] for row in found]
            assert groups[::2] == groups[1::2]  # groups stay together
            firsts = [sign * row[column] for row in found[::2]]
            assert firsts == sorted(firsts)  # and stand by their first
            assert all(
                sign * a[column] <= sign * b[column] for a, b in zip(found[::2], found[1::2], strict=True)
            )
            assert sorted(found, key=lambda row: (row["group_id"], row["sample_id"])) == whole


def test_one_group_and_one_sample(inside: Path, grpo: Grpo) -> None:
    [row] = rows_of(grpo, "--iteration", "0", "--group", "1", "--sample", "1")
    assert (row["group_id"], row["sample_id"]) == (1, 1)
    code, out, _ = grpo("show", "--where", "reward > 1e9")
    assert (code, out) == (0, "no rollout meets the condition\n")
    assert rows_of(grpo, "--where", "reward > 1e9") == []


def test_rewards_by_part_where_there_are_several(finished: Path, grpo: Grpo) -> None:
    page = grpo("show", "--iteration", "0", "--groups", "1")[1]
    assert "sample  reward  advantage" in page
    assert grpo("score", "--iteration", "0", "--force", "--set", REWARDS)[0] == 0
    page = grpo("show", "--iteration", "0", "--groups", "1")[1]
    assert [line.split()[:4] for line in page.splitlines()][2] == ["sample", "code", "length", "reward"]
    [first, *_] = rows_of(grpo, "--iteration", "0", "--groups", "1")
    values = [f"{first['rewards'][name]:+.3f}" for name in ("code", "length")]
    assert page.splitlines()[3].split()[1:3] == values
    page = grpo("show", "--iteration", "0", "--groups", "1", "--reward", "length")[1]
    assert [line.split()[:3] for line in page.splitlines()][2] == ["sample", "length", "reward"]


def test_side_by_side_fills_the_width(inside: Path, grpo: Grpo) -> None:
    from grpo.console import printable

    code, out, err = grpo("show", "--iteration", "0", "--groups", "1", "--side-by-side")
    assert (code, err) == (0, "")
    [heading] = [line for line in out.splitlines() if "sample 0" in line]
    assert "sample 1" in heading
    rows = rows_of(grpo, "--iteration", "0", "--groups", "1")
    for row in rows:
        assert f"advantage {row['advantage']:+.3f}" in out
        assert printable(row["response"]).strip() in out
    assert max(map(len, out.splitlines())) == 120


# Tokens


def test_tokens_with_what_sampler_and_learner_say(inside: Path, grpo: Grpo) -> None:
    from grpo.console import printable

    rows = rows_of(grpo, "--iteration", "0", "--tokens")
    query = "select group_id, sample_id, response_token_ids, old_logprobs from rollouts where iteration = 0"
    sampled = json.loads(grpo("sql", f"{query} order by all", "--json")[1])
    query = "select group_id, sample_id, policy_logprobs from logprobs where update_iteration = 0"
    learned = json.loads(grpo("sql", f"{query} order by all", "--json")[1])
    for row, sample, learner in zip(rows, sampled, learned, strict=True):
        tokens = row["tokens"]
        assert [token["token_id"] for token in tokens] == sample["response_token_ids"]
        assert [token["old_logprob"] for token in tokens] == sample["old_logprobs"]
        assert [token["policy_logprob"] for token in tokens] == learner["policy_logprobs"]
        text = "".join(token["text"] for token in tokens)
        assert re.sub(r"<\|[a-z]+\|>", "", text) == row["response"]
    code, out, err = grpo("show", "--iteration", "0", "--tokens", "--group", "0", "--sample", "0")
    assert (code, err) == (0, "")
    assert out.startswith(
        "probability when sampled:  from 0.9   from 0.5   from 0.1   from 0.01   below 0.01"
    )
    least = min(rows[0]["tokens"], key=lambda token: token["old_logprob"])
    assert f"least likely: '{printable(least['text'])}' {math.exp(least['old_logprob']):.3f} (token " in out
    assert "learner " in out


def test_without_a_tokenizer_there_are_no_tokens(tmp_path: Path) -> None:
    run = runs.make_run(tmp_path, [runs.row(0, 0, 0)])
    path = tmp_path / "model" / "tokenizer.json"
    path.unlink()
    with pytest.raises(InputError) as caught:
        add_tokens(run, 0, [])
    assert str(caught.value) == f"{path}: missing, and no policy of run hand has one; --tokens needs it"


# A prompt as training goes on


def test_a_prompt_over_all_iterations(inside: Path, grpo: Grpo) -> None:
    drawn = json.loads(
        grpo("sql", "select distinct iteration, group_id, prompt_id from rollouts order by all", "--json")[1]
    )
    prompt = drawn[0]["prompt_id"]
    expected = [(row["iteration"], row["group_id"]) for row in drawn if row["prompt_id"] == prompt]
    rows = rows_of(grpo, "--prompt", str(prompt))
    assert [(row["iteration"], row["group_id"]) for row in rows[::2]] == expected
    code, out, err = grpo("show", "--prompt", str(prompt))
    assert (code, err) == (0, "")
    assert f"prompt {prompt}, drawn {len(expected)} times in iterations 0 to {expected[-1][0]}" in out
    assert f"{rows[0]['group_mean']:+.3f}" in out
    alone = rows_of(grpo, "--prompt", str(prompt), "--iteration", "0")
    assert {row["prompt_id"] for row in alone} == {prompt}


def test_the_same_prompts_in_another_run(finished: Path, grpo: Grpo) -> None:
    change = ("--set", "update.learning_rate=0.5")
    assert grpo("fork", "tiny", "other", "--iteration", "0", *change)[0] == 0
    assert grpo("run", "--set", "run=other", *change)[0] == 0
    rows = rows_of(grpo, "--iteration", "1", "--against", "other")
    assert [row["run"] for row in rows] == ["tiny", "tiny", "other", "other"] * 3
    assert len({row["prompt_id"] for row in rows[:4]}) == 1
    code, out, err = grpo("show", "--iteration", "1", "--against", "other:1", "--groups", "1")
    assert (code, err) == (0, "")
    assert "tiny iteration 1  " in out
    assert "other iteration 1  " in out
    assert out.endswith("prompts 1 of 3; --page 2\n")
    code, _, err = grpo("show", "--iteration", "1", "--against", "other:7")
    assert (code, err) == (2, "error: --against other:7: run other has rollouts of 0 to 1\n")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page", "9"], "--page 9: 3 groups are 1 page of 3"),
        (["--page", "4", "--groups", "1"], "--page 4: 3 groups are 3 pages of 1"),
        (["--sort", "x"], "--sort x: expected one of reward, advantage, tokens, mismatch, spread, code"),
        (["--group", "3"], "--group 3: iteration 1 has groups 0 to 2"),
        (["--group", "0", "--sample", "2"], "--sample 2: iteration 1 has samples 0 to 1"),
        (["--group", "0", "--where", "false"], "--group 0: no rollout meets the condition"),
        (
            ["--where", "true); select 1 as group_id --"],
            '--where true); select 1 as group_id --: syntax error at or near ")"; expected one condition',
        ),
        (["--reward", "x"], "--reward x: iteration 1 has code"),
        (["--prompt", "6"], "--prompt 6: the run has prompts 0 to 5"),
        (["--against", "x"], "artifacts/x: no such run; runs there: tiny"),
        (
            ["--where", "reward"],
            "--where reward: is of type DOUBLE; expected a condition, true or false, such as reward > 0",
        ),
        (["--against", "x:y"], "--against x:y: expected an iteration 40, a run NAME, or NAME:40"),
        (["--against", "²"], "artifacts/²: no such run; runs there: tiny"),  # a digit, and no number
        (
            ["--against", "tiny:1000000000"],
            "--against tiny:1000000000: expected an iteration 40, a run NAME, or NAME:40",
        ),
        (["--against", "tiny:²"], "--against tiny:²: expected an iteration 40, a run NAME, or NAME:40"),
        (["--against", "5"], "--against tiny:5: run tiny has rollouts of 0 to 1"),
        (["--against", "tiny:7"], "--against tiny:7: run tiny has rollouts of 0 to 1"),
        (["--against", "0", "--iteration", "5"], "--iteration 5: run tiny has rollouts of 0 to 1"),
        (["--reverse"], "--reverse: turns the order of --sort; give both"),
        (
            ["--against", "0", "--group", "0"],
            "--group: changes nothing of what --against shows; leave one of them out",
        ),
        (
            ["--against", "0", "--side-by-side"],
            "--side-by-side: changes nothing of what --against shows; leave one of them out",
        ),
        (
            ["--tokens", "--side-by-side"],
            "--side-by-side: changes nothing of what --tokens shows; leave one of them out",
        ),
        (
            ["--tokens", "--reward", "code"],
            "--reward: changes nothing of what --tokens shows; leave one of them out",
        ),
        (
            ["--prompt", "0", "--page", "2"],
            "--page: changes nothing of what --prompt without --iteration shows; leave one of them out",
        ),
    ],
)
def test_what_is_not_there_is_one_line(inside: Path, grpo: Grpo, arguments: list[str], message: str) -> None:
    assert grpo("show", *arguments) == (2, "", f"error: {message}\n")


def test_iterations_without_a_prompt_in_common(inside: Path, grpo: Grpo) -> None:
    # 6 prompts, 3 an iteration: a pass of two iterations draws each prompt once
    code, _, err = grpo("show", "--iteration", "1", "--against", "0")
    assert (code, err) == (
        2,
        "error: --against 0: iteration 1 and iteration 0 drew none of these prompts both; --prompt ID shows"
        " one over all iterations\n",
    )


def test_a_condition_that_nothing_meets_is_no_matter_of_prompts(inside: Path, grpo: Grpo) -> None:
    code, out, err = grpo("show", "--iteration", "1", "--against", "0", "--where", "reward > 1e9")
    assert (code, out, err) == (0, "no rollout meets the condition\n", "")


# Text that a model wrote, and the terminal


def test_what_a_model_wrote_is_text_in_every_view(finished: Path, grpo: Grpo) -> None:
    hostile_rollouts()
    prompt = str(rows_of(grpo, "--iteration", "0")[0]["prompt_id"])
    for arguments in (("--iteration", "0", "--side-by-side"), ("--prompt", prompt), ("--iteration", "0")):
        code, out, err = grpo("show", *arguments)
        assert (code, err) == (0, "")
        assert r"\x1b[31mred" in out
        assert "[/b]" in out
        assert not {"\x1b", "\x07", "\u202e", "\u2028"} & set(out)
    assert SHOWN in out
    assert rows_of(grpo, "--iteration", "0")[0]["response"] == HOSTILE


def test_on_a_terminal_there_is_a_pager_and_colour(inside: Path) -> None:
    def output(*arguments: str) -> bytes:
        main, terminal = pty.openpty()
        environment = {**os.environ, "PAGER": "sed s/^/paged:/", "TERM": "xterm-256color", "COLUMNS": "100"}
        code = "from grpo.cli import main; main()"
        command = [sys.executable, "-c", code, "show", "--iteration", "0", "--tokens", *arguments]
        done = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
        os.close(terminal)
        read = b""
        try:
            while piece := os.read(main, 65536):
                read += piece
        except OSError:  # the other end is closed: that is how a terminal ends
            pass
        os.close(main)
        assert done.wait() == 0
        return read

    paged = output()
    assert b"paged:" in paged
    assert b"\x1b[" in paged  # shades
    assert b"paged:" not in output("--no-pager")
