# transformers' models and configurations are not typed well enough for:
# mypy: disable-error-code="no-untyped-call"
"""The real stage, real worker processes and a tiny reward model, on rollouts written by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tests import tiny
from transformers import Qwen2ForSequenceClassification

from grpo import tables
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Plan, Product, Run, Staging, files, id_of
from grpo.config import Config
from grpo.console import Console
from grpo.errors import EngineError, GrpoError, InputError, Interrupted, UsageError
from grpo.generate import plan as generate
from grpo.models import starter_model
from grpo.pipeline import work
from grpo.prompts import table as prompts_module
from grpo.score import shard_rows
from grpo.score.functions.built_in import gsm8k
from grpo.score.plan import plan as planned
from grpo.score.reward_model import RewardModel

K = 2
# Two groups a shard, three groups: shards of 4 and 2 rollouts.
RESPONSES = [["7", "34"], ["5", "five"], ["", "10"]]
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "3+4=", "answer": "7", "level": 1},
    {"prompt": "2+3=", "answer": "5", "level": 2},
    {"prompt": "1+9=", "answer": "10", "level": 3},
]

# Each function notes its calls: one line for each, with how many rollouts it was given.
REWARD = '''
import os, signal
from pathlib import Path

HERE = Path(__file__).parent


def note(name, completions):
    with open(HERE / f"{name}.calls", "a") as file:
        file.write(f"{len(completions)}\\n")


def length(prompts, completions, **columns):
    note("length", completions)
    return [float(len(text)) for text in completions]


def other(prompts, completions, **columns):
    note("other", completions)
    return [-1.0 for _ in completions]


def fails_on_words(prompts, completions, **columns):
    """Fails while the file `broken` is there."""
    note("fails_on_words", completions)
    if (HERE / "broken").exists():
        return [float("nan") if text.isalpha() else 1.0 for text in completions]
    return [2.0 for _ in completions]


def crashes_on_words(prompts, completions, **columns):
    if any(text.isalpha() for text in completions):
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0 for _ in completions]


def every_status(prompts, completions, **columns):
    values = {"7": 1, "34": None, "5": float("inf"), "five": "a word", "": 0}
    if "10" in completions:
        raise ValueError("ten is too much")
    return [values[text] for text in completions]


def hangs_on_words(prompts, completions, **columns):
    import time

    if any(text.isalpha() for text in completions):
        time.sleep(60)
    return [1.0 for _ in completions]


def weighted(completions, answer, level, *, bonus, per=1.0):
    """Columns by name, and arguments by name."""
    rows = zip(completions, answer, level, strict=True)
    return [(text == right) * bonus + n / per for text, right, n in rows]


def trl_style(prompts, completions, completion_ids, answer, **kwargs):
    """As in TRL: text, or messages where the prompt is messages."""
    found = []
    for prompt, completion, ids, right in zip(prompts, completions, completion_ids, answer, strict=True):
        if isinstance(prompt, list):
            assert [message["role"] for message in prompt] == ["system", "user"]
            assert [message["role"] for message in completion] == ["assistant"]
            prompt, completion = prompt[-1]["content"], completion[0]["content"]
        assert prompt[1] == "+" and prompt[3:] == "="
        assert bytes(ids).decode() == completion
        found.append(float(completion == right) + 10 * kwargs["level"][len(found)])
    assert sorted(kwargs) == ["level", "log_extra", "log_metric", "prompt_id", "trainer_state"]
    return found
'''


def opened(folder: Path, *rewards: dict[str, Any], prompts: Any = None, **score: Any) -> ActiveRun:
    """The run in `folder` under these rewards; the first time with prompts and rollouts, written by hand."""
    folder.mkdir(exist_ok=True)
    if not (folder / "reward.py").exists():
        (folder / "reward.py").write_text(REWARD)
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    config = {
        "run": "r",
        "model": "m",
        "prompts": {"source": "p.jsonl", **(prompts or {})},
        "generate": {
            "prompts_per_iteration": len(RESPONSES),
            "samples_per_prompt": K,
            "rollouts_per_shard": 2 * K,
        },
        "score": {"rewards": list(rewards), "workers": 1, **score},
    }
    run = ActiveRun(folder / "artifacts", Config.model_validate(config), folder, Console(quiet=True))
    if not run.path.exists():
        write_inputs(run)
    return run


def write_inputs(run: ActiveRun) -> None:
    """Commit `policy`, `prompts` and the rollouts of iteration 0: group g is prompt g."""
    files.make_folder(run.path)
    ids = {"policy": "p", "reference": "p"}
    Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0).commit(Product(ids, [], {}))
    prompts_module.prepare(run, Staging(run, prompts_module.plan(run), 0), lambda rows: [1] * len(rows), None)
    plan = generate.plan(run, 0)
    staging = Staging(run, plan, 0)
    records = []
    for index, (start, end) in enumerate(plan.shards):
        data = rollouts_table([(g, s) for g in range(start, end) for s in range(K)])
        records.append(staging.write_table("rollouts", staging.file_name("part", index), data))
    staging.commit(Product({"rollouts": id_of(records)}, records, {}))


def rollouts_table(places: Sequence[tuple[int, int]]) -> pa.Table:
    rows = []
    for group, sample in places:
        token_ids = list(RESPONSES[group][sample].encode())  # a token is a byte
        rows.append(
            {
                **{"iteration": 0, "group_id": group, "sample_id": sample, "prompt_id": group, "round": 0},
                **{"prompt": PROMPTS[group]["prompt"], "response": RESPONSES[group][sample]},
                **{"prompt_token_ids": [1], "response_token_ids": token_ids},
                **{"old_logprobs": [-1.0] * len(token_ids), "response_mask": [True] * len(token_ids)},
                **{"finish_reason": "stop", "response_tokens": len(token_ids), "policy_iteration": 0},
                **{"temperature": 1.0, "seed": 2 * group + sample},
            }
        )
    return pa.Table.from_pylist(rows, schema=tables.schema("rollouts"))


def scored(run: ActiveRun, force: bool = False) -> Manifest:
    """`grpo score --iteration 0`."""
    work.run_stage(run, "score", "0", force)
    manifest = run.manifest("rewards", 0)
    assert manifest is not None
    return manifest


def failed(run: ActiveRun, force: bool = False) -> str:
    """The message of a `grpo score` that committed failed rewards (exit 8)."""
    with pytest.raises(EngineError) as caught:
        scored(run, force)
    assert caught.value.exit_code == 8
    return str(caught.value)


def rows(run: Run) -> list[dict[str, Any]]:
    return list(run.read("rewards", 0).to_pylist())


def values(run: Run, name: str) -> list[float | None]:
    """Of one reward, in key order."""
    return [row["value"] for row in rows(run) if row["name"] == name]


def calls(folder: Path, name: str) -> list[int]:
    """How many rollouts each call of a function was given, since the last look."""
    path = folder / f"{name}.calls"
    found = [int(line) for line in path.read_text().split()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


# `grpo score` in a process of its own, without the command line: the command would want a policy.
SCORE = """
import sys
from pathlib import Path
from grpo.pipeline import work
from grpo.artifacts import ActiveRun
from grpo.cli import entry
from grpo.config import Config
from grpo.console import Console

folder = Path(sys.argv[1])
run = ActiveRun(folder / "artifacts", Config.model_validate_json(sys.argv[2]), folder, Console(quiet=True))
entry.app = lambda **_: work.run_stage(run, "score", "0", force=False)
entry.main()
"""
HANGS = """
import threading
from grpo.score.reward_model import RewardModel

RewardModel._values = lambda *arguments: threading.Event().wait()
"""


def reward(function: str, **keys: Any) -> dict[str, Any]:
    return {"function": f"reward:{function}", **keys}


# ---- rows ----


def test_one_row_per_rollout_and_reward_and_one_shard_per_reward_and_rollout_shard(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("length", weight=0.5), {"function": "exact_answer"})
    manifest = scored(run)
    data = run.read("rewards", 0)
    assert data.schema.equals(tables.schema("rewards"))
    keys = [(0, group, sample) for group in range(3) for sample in range(K)]
    found = [(row["iteration"], row["group_id"], row["sample_id"]) for row in rows(run)]
    assert found == [*keys, *keys]
    assert data["name"].to_pylist() == ["length"] * 6 + ["exact_answer"] * 6
    assert data["weight"].to_pylist() == [0.5] * 6 + [1.0] * 6
    # Lengths of "7" "34" "5" "five" "" "10"; right are "7", "5" and "10".
    assert values(run, "length") == [1.0, 2.0, 1.0, 4.0, 0.0, 2.0]
    assert values(run, "exact_answer") == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert set(data["status"].to_pylist()) == {"ok"}
    assert data["error"].null_count == 12
    assert [(file.labels["reward"], file.rows) for file in manifest.files] == [
        ("length", 4),
        ("length", 2),
        ("exact_answer", 4),
        ("exact_answer", 2),
    ]
    assert sorted(manifest.ids) == ["reward/exact_answer", "reward/length"]
    assert manifest.summary == {
        "failed": 0,
        "statuses": {"ok": 12},
        "weights": {"length": 0.5, "exact_answer": 1.0},
    }
    assert calls(tmp_path, "length") == [2, 2, 2]  # a call is a group


def test_every_status_is_a_row(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("every_status"), reward("hangs_on_words", timeout_s=0.5))
    message = failed(run)
    found = [(row["value"], row["status"], row["error"]) for row in rows(run)]
    assert found[:4] == [
        (1.0, "ok", None),
        (None, "not_applicable", None),
        (None, "nonfinite", "returned inf"),
        (None, "error", "returned str 'a word', not a number"),
    ]
    assert found[4] == (0.0, "ok", None)  # tried alone, since its group's call failed
    assert found[5][:2] == (None, "error")
    assert found[5][2].startswith("ValueError: ten is too much (reward.py, line ")
    assert [row[1] for row in found[6:]] == ["ok", "ok", "ok", "timeout", "ok", "ok"]
    assert found[9][2].startswith("no result within 0.5 s (in hangs_on_words, reward.py, line ")
    manifest = run.manifest("rewards", 0)
    assert manifest is not None
    statuses = {"ok": 7, "not_applicable": 1, "nonfinite": 1, "error": 2, "timeout": 1}
    assert manifest.summary["statuses"] == statuses
    assert manifest.summary["failed"] == 4
    assert message == (
        "score: iteration 0: 4 of 12 rewards failed (2 error, 1 timeout, 1 nonfinite); first: every_status:"
        " returned inf; the same command scores only those again, `score.on_error: drop` leaves their"
        " rollouts out"
    )


def test_a_function_that_kills_its_process_costs_one_rollout(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("crashes_on_words"))
    failed(run)
    statuses = [row["status"] for row in rows(run)]
    assert statuses == ["ok", "ok", "ok", "error", "ok", "ok"]  # "five" is the only word
    assert rows(run)[3]["error"] == ("the process ended during the call (SIGKILL, perhaps out of memory)")
    assert values(run, "crashes_on_words") == [1.0, 1.0, 1.0, None, 1.0, 1.0]


def test_with_drop_failed_rewards_are_committed_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    run = opened(tmp_path, reward("fails_on_words"), on_error="drop")
    manifest = scored(run)
    assert manifest.summary["failed"] == 1
    calls(tmp_path, "fails_on_words")
    assert scored(run) == manifest  # nothing is to be done
    assert calls(tmp_path, "fails_on_words") == []


# ---- what a function is given ----


def test_columns_and_arguments_are_passed_by_name(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("weighted", arguments={"bonus": 100.0, "per": 4.0}))
    scored(run)
    # 100 where right, plus level / 4.
    assert values(run, "weighted") == [100.25, 0.25, 100.5, 0.5, 0.75, 100.75]


@pytest.mark.parametrize("chat", [False, True])
def test_a_function_in_trl_s_style_works_unchanged(tmp_path: Path, chat: bool) -> None:
    settings = {"chat": True, "system": "Add."} if chat else {}
    run = opened(tmp_path, reward("trl_style"), prompts=settings)
    scored(run)
    # 10 x level, plus 1 where right.
    assert values(run, "trl_style") == [11.0, 10.0, 21.0, 20.0, 30.0, 31.0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            reward("weighted"),
            "reward function 'reward:weighted': needs bonus: not in arguments, and no column;"
            " the columns are: prompt_id, answer, level",
        ),
        (
            reward("weighted", arguments={"bonus": 1, "bones": 2}),
            "reward function 'reward:weighted': arguments.bones: the function takes no such keyword, but:"
            " completions, answer, level, bonus, per",
        ),
        (
            reward("lenght"),
            "reward function 'reward:lenght': no 'lenght' in reward; it has: note, length, other,"
            " fails_on_words, crashes_on_words, every_status, hangs_on_words, weighted, trl_style",
        ),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_any_call(
    tmp_path: Path, broken: dict[str, Any], message: str
) -> None:
    run = opened(tmp_path, reward("length"), broken)
    with pytest.raises(UsageError) as caught:
        scored(run)
    assert str(caught.value) == message
    assert run.manifest("rewards", 0) is None
    assert calls(tmp_path, "length") == []


# ---- what is kept, what is scored again ----


def refused(run: ActiveRun) -> str:
    """What `grpo score` without --force says; nothing may change."""
    before = run.manifest("rewards", 0)
    with pytest.raises(InputError) as caught:
        scored(run)
    assert caught.value.exit_code == 4
    assert run.manifest("rewards", 0) == before
    return str(caught.value).removeprefix(f"{run.folder('rewards', 0)}: ")


def inodes(run: Run, manifest: Manifest, name: str) -> list[int]:
    """Where the shards of a reward are on disk: a hard link has its source's."""
    held = [file for file in manifest.files if file.labels["reward"] == name]
    return [run.path_of(file, "rewards", 0).stat().st_ino for file in held]


def test_again_there_is_nothing_to_do(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("length"))
    manifest = scored(run)
    assert calls(tmp_path, "length") == [2, 2, 2]
    assert scored(run) == manifest
    assert calls(tmp_path, "length") == []


def test_a_new_weight_rewrites_the_rows_without_a_call(tmp_path: Path) -> None:
    first = scored(opened(tmp_path, reward("length"), reward("other")))
    run = opened(tmp_path, reward("length", weight=0.25), reward("other"))
    kept, replaced = inodes(run, first, "other"), inodes(run, first, "length")
    assert (calls(tmp_path, "length"), calls(tmp_path, "other")) == ([2, 2, 2], [2, 2, 2])
    expected = "changed (score.rewards.length.weight: 1.0 -> 0.25); --force reruns it"
    assert refused(run) == expected
    second = scored(run, force=True)
    assert (calls(tmp_path, "length"), calls(tmp_path, "other")) == ([], [])
    assert [row["weight"] for row in rows(run)] == [0.25] * 6 + [1.0] * 6
    assert values(run, "length") == [1.0, 2.0, 1.0, 4.0, 0.0, 2.0]
    assert inodes(run, second, "other") == kept  # the same files
    assert not set(inodes(run, second, "length")) & set(replaced)
    assert second.ids["reward/other"] == first.ids["reward/other"]
    assert second.ids["reward/length"] != first.ids["reward/length"]


def test_an_added_reward_scores_only_itself(tmp_path: Path) -> None:
    first = scored(opened(tmp_path, reward("length")))
    assert calls(tmp_path, "length") == [2, 2, 2]
    run = opened(tmp_path, reward("other"), reward("length"))  # in front: places move, files stay
    kept = inodes(run, first, "length")
    assert refused(run) == "changed (score.rewards.other: added); --force reruns it"
    second = scored(run, force=True)
    assert (calls(tmp_path, "length"), calls(tmp_path, "other")) == ([], [2, 2, 2])
    assert inodes(run, second, "length") == kept
    assert second.ids["reward/length"] == first.ids["reward/length"]
    assert [row["name"] for row in rows(run)] == ["other"] * 6 + ["length"] * 6


def test_a_removed_reward_leaves_the_others(tmp_path: Path) -> None:
    first = scored(opened(tmp_path, reward("length"), reward("other")))
    run = opened(tmp_path, reward("other"))
    kept = inodes(run, first, "other")
    calls(tmp_path, "length"), calls(tmp_path, "other")
    assert refused(run) == "changed (score.rewards.length: removed); --force reruns it"
    second = scored(run, force=True)
    assert (calls(tmp_path, "length"), calls(tmp_path, "other")) == ([], [])
    assert inodes(run, second, "other") == kept
    assert {row["name"] for row in rows(run)} == {"other"}


def test_a_reward_with_another_name_keeps_its_values(tmp_path: Path) -> None:
    scored(opened(tmp_path, reward("length")))
    calls(tmp_path, "length")
    run = opened(tmp_path, reward("length", name="size"))
    scored(run, force=True)
    assert calls(tmp_path, "length") == []
    assert values(run, "size") == [1.0, 2.0, 1.0, 4.0, 0.0, 2.0]
    assert len(rows(run)) == 6


def test_other_arguments_are_another_reward(tmp_path: Path) -> None:
    scored(opened(tmp_path, reward("weighted", arguments={"bonus": 1})))
    run = opened(tmp_path, reward("weighted", arguments={"bonus": 2}))
    expected = "changed (score.rewards.weighted.arguments.bonus: 1 -> 2); --force reruns it"
    assert refused(run) == expected
    scored(run, force=True)
    assert values(run, "weighted") == [3.0, 1.0, 4.0, 2.0, 3.0, 5.0]  # 2 where right, plus level


def test_force_with_nothing_changed_scores_anew(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("length"))
    first = scored(run)
    assert calls(tmp_path, "length") == [2, 2, 2]
    second = scored(run, force=True)
    assert calls(tmp_path, "length") == [2, 2, 2]
    assert (first.attempt, second.attempt) == (0, 1)
    assert second.ids == first.ids  # the same rows: what follows stays fresh


def test_a_reward_whose_file_changed_differs_and_is_scored_anew(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("length"), {"function": "exact_answer"})
    first = scored(run)
    kept = inodes(run, first, "exact_answer")
    calls(tmp_path, "length")
    source = tmp_path / "reward.py"
    source.write_text(source.read_text().replace("float(len(text))", "float(len(text) + 10)"))
    run = opened(tmp_path, reward("length"), {"function": "exact_answer"})
    assert refused(run) == "changed (score.rewards.length: its file changed); --force reruns it"
    second = scored(run, force=True)
    assert calls(tmp_path, "length") == [2, 2, 2]
    assert values(run, "length") == [11.0, 12.0, 11.0, 14.0, 10.0, 12.0]
    assert inodes(run, second, "exact_answer") == kept


def test_a_file_that_changes_meanwhile_scores_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what a worker of then makes of it, nor what one that is started anew does."""
    source, commit = tmp_path / "reward.py", shard_rows.commit

    def edited(*given: Any) -> FileRecord:
        record = commit(*given)
        source.write_text(source.read_text().replace("float(len(text))", "float(len(text) + 10)"))
        return record

    run = opened(tmp_path, reward("length"))
    expected = "score.rewards: length: its file changed while the command was at work; run it again"
    with monkeypatch.context() as patched:
        patched.setattr(shard_rows, "commit", edited)
        with pytest.raises(InputError, match=expected):
            scored(run)
    scored(opened(tmp_path, reward("length")))
    assert values(run, "length") == [11.0, 12.0, 11.0, 14.0, 10.0, 12.0]  # all by the file of now
    begin = shard_rows.begin

    def edited_within(*given: Any) -> shard_rows.Begun:
        begun = begin(*given)
        source.write_text(source.read_text() + "\n# again\n")
        return begun

    monkeypatch.setattr(shard_rows, "begin", edited_within)
    with pytest.raises(InputError, match=expected):
        scored(opened(tmp_path, reward("length")), force=True)


def test_changed_rollouts_are_scored_anew(tmp_path: Path) -> None:
    run = opened(tmp_path, reward("length"))
    scored(run)
    calls(tmp_path, "length")
    plan = generate.plan(run, 0)
    staging = Staging(run, plan, 1)
    data = [rollouts_table([(0, 0), (0, 1), (1, 0), (1, 1)]), rollouts_table([(2, 1), (2, 0)])]
    records = [
        staging.write_table("rollouts", staging.file_name("part", n), part) for n, part in enumerate(data)
    ]
    staging.commit(Product({"rollouts": id_of(records)}, records, {}))
    scored(run)  # stale: no --force is needed
    assert calls(tmp_path, "length") == [2]  # the shard that changed, and not the other
    assert values(run, "length") == [1.0, 2.0, 1.0, 4.0, 2.0, 0.0]


# ---- partial ----


def test_only_the_rows_that_failed_are_scored_again(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    run = opened(tmp_path, reward("fails_on_words"), reward("other"))
    assert "1 of 12 rewards failed (1 nonfinite); first: fails_on_words: returned nan" in failed(run)
    assert values(run, "fails_on_words") == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    calls(tmp_path, "fails_on_words"), calls(tmp_path, "other")

    assert "1 of 12 rewards failed" in failed(run)  # still broken: only the one rollout was tried
    assert (calls(tmp_path, "fails_on_words"), calls(tmp_path, "other")) == ([1], [])

    # Twice in the same way: a third time it is asked for.
    (tmp_path / "broken").unlink()
    assert "1 failed twice in the same way and is not tried again but by `grpo score --only" in failed(run)
    assert (calls(tmp_path, "fails_on_words"), calls(tmp_path, "other")) == ([], [])
    work.run_stage(run, "score", "0", force=False, only_failed=True)
    manifest = scored(run)
    assert calls(tmp_path, "fails_on_words") == [1]
    assert calls(tmp_path, "other") == []
    # The one that failed has the value of now, the others that of then.
    assert values(run, "fails_on_words") == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    assert manifest.summary["failed"] == 0
    assert (manifest.attempt, calls(tmp_path, "fails_on_words")) == (3, [])
    assert scored(run) == manifest


def late(function: str, **keys: Any) -> dict[str, Any]:
    return {**reward(function), "timeout_s": 0.5, **keys}


def test_what_a_time_out_counts(tmp_path: Path) -> None:
    run = opened(tmp_path, late("hangs_on_words"), reward("other"))
    assert "1 of 12 rewards failed (1 timeout)" in failed(run)
    # Another value of on_timeout tries nothing again: how late it was is known.
    started = time.monotonic()
    run = opened(tmp_path, late("hangs_on_words", on_timeout=-0.5), reward("other"))
    manifest = scored(run, force=True)
    assert time.monotonic() - started < 5  # of 60 s that it hangs
    assert manifest.summary["failed"] == 0
    assert values(run, "hangs_on_words") == [1.0, 1.0, 1.0, -0.5, 1.0, 1.0]
    [row] = [row for row in rows(run) if row["error"]]
    assert row["status"] == "ok"
    assert row["error"].startswith("counts -0.5 (on_timeout): no result within 0.5 s (in hangs_on_words, rew")
    # And back again.
    run = opened(tmp_path, late("hangs_on_words", weight=2.0), reward("other"))
    assert "1 timeout); first: hangs_on_words: no result within 0.5 s" in failed(run, force=True)


def test_math_verify_counts_a_time_out_as_wrong(tmp_path: Path) -> None:
    run = opened(
        tmp_path, {"function": "math_verify"}, {"function": "math_verify", "name": "x", "on_timeout": "error"}
    )
    assert [reward.on_timeout for reward in run.config.score.rewards] == [0.0, "error"]


def test_a_time_out_is_not_tried_for_ever_but_with_more_time(tmp_path: Path) -> None:
    run = opened(tmp_path, late("hangs_on_words"))
    for message in (
        "the same command scores only those again",
        "the same command",
        "failed twice in the same way",
    ):
        started = time.monotonic()
        assert "1 of 6 rewards failed (1 timeout)" in (said := failed(run))
        assert message in said or message == "the same command"
    assert time.monotonic() - started < 0.5 + 2  # the third tried nothing
    run = opened(tmp_path, late("hangs_on_words", timeout_s=0.7))
    assert "first: hangs_on_words: no result within 0.7 s" in failed(run, force=True)


def test_advantage_refuses_a_partial_output(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    run = opened(tmp_path, reward("fails_on_words"))
    failed(run)
    with pytest.raises(GrpoError) as caught:
        work.run_stage(run, "advantage", "0", force=False)
    assert caught.value.exit_code == 4
    assert run.manifest("advantages", 0) is None


# ---- reward models ----


def write_classifier(folder: Path, seed: int = 0) -> Callable[[str], float]:
    """Save a random reward model; returns its value of a text by a plain forward pass."""
    torch.manual_seed(seed)
    model = Qwen2ForSequenceClassification(tiny.qwen2(num_labels=1)).eval()
    model.save_pretrained(folder)
    starter_model.build_tokenizer().save_pretrained(folder)

    def value(text: str) -> float:
        # <|endoftext|> is token 256; everything else is bytes.
        before, *after = text.split(starter_model.EOS)
        token_ids = list(before.encode()) + [t for part in after for t in (256, *part.encode())]
        with torch.inference_mode():
            return float(model(input_ids=torch.tensor([token_ids])).logits[0, 0])

    return value


def shown(prompt: str, response: str, system: str = "") -> str:
    """A finished conversation, as the starter's chat template writes it."""
    return f"{system}user: {prompt}\nassistant: {response}{starter_model.EOS}\n"


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_gives_what_a_plain_forward_pass_gives(tmp_path: Path, chat: bool) -> None:
    value = write_classifier(tmp_path / "rm")
    system = "system: Add.\n" if chat else ""
    run = opened(tmp_path, {"model": "./rm"}, prompts={"system": "Add."} if chat else {})
    manifest = scored(run)
    texts = [shown(PROMPTS[group]["prompt"], text, system) for group in range(3) for text in RESPONSES[group]]
    expected = [value(text) for text in texts]
    assert max(expected) - min(expected) > 0.01  # else equal values would prove nothing
    assert values(run, "rm") == pytest.approx(expected, abs=1e-5)
    assert {row["status"] for row in rows(run)} == {"ok"}
    assert list(manifest.ids) == ["reward/rm"]


def test_a_model_and_functions_score_side_by_side(tmp_path: Path) -> None:
    value = write_classifier(tmp_path / "rm")
    run = opened(
        tmp_path,
        reward("length", weight=0.1),
        {"model": "./rm", "name": "taste", "weight": 2.0},
        {"function": "gsm8k", "weight": 0.0},
        max_tokens_per_batch=1,  # each rollout alone
    )
    scored(run)
    assert Counter(row["name"] for row in rows(run)) == {"length": 6, "taste": 6, "gsm8k": 6}
    assert values(run, "length") == [1.0, 2.0, 1.0, 4.0, 0.0, 2.0]
    texts = [shown(PROMPTS[group]["prompt"], text) for group in range(3) for text in RESPONSES[group]]
    assert values(run, "taste") == pytest.approx([value(text) for text in texts], abs=1e-5)
    groups = zip(PROMPTS, RESPONSES, strict=True)
    right = [v for row, texts in groups for v in gsm8k([row["prompt"]] * K, texts, [row["answer"]] * K)]
    assert values(run, "gsm8k") == right == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_a_rollout_too_long_for_the_model_fails_and_the_others_are_scored(tmp_path: Path) -> None:
    write_classifier(tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    # "user: 3+4=\nassistant: " are 22 tokens, end and newline 2: 25 with "7", 26 with "34", 28 with "five".
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 26}))
    run = opened(tmp_path, {"model": "./rm"})
    message = failed(run)
    assert [row["status"] for row in rows(run)] == ["ok", "ok", "ok", "error", "ok", "ok"]
    error = "prompt and response are 28 tokens, the reward model's context is 26"
    assert rows(run)[3]["error"] == error
    assert f"1 of 6 rewards failed (1 error); first: rm: {error};" in message


def test_another_reward_model_in_its_place_differs(tmp_path: Path) -> None:
    write_classifier(tmp_path / "rm")
    scored(opened(tmp_path, {"model": "./rm"}))
    value = write_classifier(tmp_path / "rm", seed=1)
    run = opened(tmp_path, {"model": "./rm"})
    assert refused(run) == "changed (score.rewards.rm: its file changed); --force reruns it"
    scored(run, force=True)
    assert values(run, "rm")[0] == pytest.approx(value(shown("3+4=", "7")), abs=1e-5)


def test_a_reward_model_goes_on_at_the_next_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = write_classifier(tmp_path / "rm")
    run = opened(tmp_path, {"model": "./rm"})
    compute = RewardModel._values

    def signalled(model: RewardModel, rows: Sequence[Sequence[int]]) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)  # which ends it behind the shard
        monkeypatch.undo()
        return compute(model, rows)

    monkeypatch.setattr(RewardModel, "_values", signalled)
    with run.console.signals(), pytest.raises(Interrupted):
        scored(run)
    [staged] = (run.path / ".staging").rglob("part-*.parquet")
    before = staged.stat().st_ino
    run = opened(tmp_path, {"model": "./rm"})
    manifest = scored(run)
    assert [file.rows for file in manifest.files] == [4, 2]
    assert inodes(run, manifest, "rm")[0] == before
    assert values(run, "rm")[0] == pytest.approx(value(shown("3+4=", "7")), abs=1e-5)


def test_a_batch_that_takes_too_long_ends_the_command(tmp_path: Path) -> None:
    write_classifier(tmp_path / "rm")
    run = opened(tmp_path, {"model": "./rm", "timeout_s": 0.2}, max_tokens_per_batch=60)
    arguments = [str(tmp_path), run.config.model_dump_json()]
    done = subprocess.run([sys.executable, "-c", HANGS + SCORE, *arguments], capture_output=True, text=True)
    assert done.returncode == EngineError.exit_code
    assert done.stderr.splitlines()[-1] == (
        f"error: reward model {tmp_path}/rm: a batch of 2 rollouts took longer than timeout_s, 0.2 s;"
        " allow it more, or fewer score.max_tokens_per_batch"
    )
    assert run.manifest("rewards", 0) is None
    scored(opened(tmp_path, {"model": "./rm"}))  # nothing is in its way


def test_a_reward_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        planned(opened(tmp_path, {"model": "./rm"}), 0)
    where = f"{tmp_path}/rm"
    assert str(caught.value) == f"{where}: no such directory; a Hugging Face checkpoint directory is needed"
