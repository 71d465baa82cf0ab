"""The pipeline end to end on a tiny project: what is done, what is stale, what runs again."""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo

from grpo.artifacts import seal
from grpo.models.weights import Weights

ARTIFACTS = Path("artifacts/tiny")
STAGES = ("generate", "score", "advantage", "update")
DONE = [["done"] * 4] * 2
TWO_REWARDS = "score.rewards=[{function: 'reward:code'}, {function: 'reward:length', weight: 0}]"
LENGTH = "score.rewards[0].function=reward:length"
# Fails for the group of one prompt while the file `marker` is there; notes each call that succeeds.
FAILING = """\
import os


def code(prompts, completions, **columns):
    if os.path.exists("marker") and "3+1=" in prompts:
        raise RuntimeError("no reward")
    with open("calls", "a") as calls:
        calls.write(f"{prompts[0]} {len(prompts)}\\n")
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""


def states(grpo: Grpo, *options: str) -> list[list[str]]:
    """State of each stage, by iteration."""
    code, out, err = grpo("status", "--json", *options)
    assert code == 0, err
    rows = json.loads(out)["iterations"]
    return [[row["stages"][stage]["state"] for stage in STAGES] for row in rows]


def reasons(grpo: Grpo, *options: str) -> dict[str, str]:
    """Why a stage is not done: `score 0` -> reason."""
    rows = json.loads(grpo("status", "--json", *options)[1])["iterations"]
    return {
        f"{stage} {row['iteration']}": row["stages"][stage]["why"]
        for row in rows
        for stage in STAGES
        if row["stages"][stage]["why"]
    }


def digests(folder: Path = ARTIFACTS) -> dict[str, str]:
    """sha256 of every committed table, weight and optimiser state."""
    committed = [*folder.glob("*/**/*.parquet"), *folder.glob("*/**/*.safetensors")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(committed)
        if not path.relative_to(folder).parts[0].startswith(".")
    }


def manifest(iteration: int, output: str) -> dict[str, Any]:
    path = ARTIFACTS / f"iteration={iteration:06d}" / output / "manifest.json"
    data: dict[str, Any] = json.loads(path.read_bytes())
    return data


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


# Done, and nothing to do


def test_a_run_makes_what_the_design_says(finished: Path, grpo: Grpo) -> None:
    assert states(grpo) == DONE
    folders = ["iteration=000000", "iteration=000001", "policy", "prompts", "run.json", "sources"]
    assert sorted(path.name for path in ARTIFACTS.iterdir() if not path.name.startswith(".")) == folders
    # 3 prompts x 2 samples in shards of at most 4 rollouts: 2 groups, then 1.
    assert [file["rows"] for file in manifest(0, "rollouts")["files"]] == [4, 2]
    update = ARTIFACTS / "iteration=000001" / "update"
    tables = sorted(path.name.partition("-")[0] for path in update.glob("*.parquet"))
    assert tables == ["logprobs", "updates"]
    assert (update.parent / "checkpoint" / "policy" / "model.safetensors").exists()
    policy = manifest(0, "update")["ids"]["policy"]
    assert (
        policy == manifest(1, "rollouts")["inputs"]["policy@1"] == manifest(1, "update")["inputs"]["policy@1"]
    )
    assert manifest(0, "checkpoint")["inputs"] == {"policy@1": policy}
    assert not list(ARTIFACTS.glob(".staging/**/*.json"))


def test_run_json_says_what_the_run_was_made_with(finished: Path) -> None:
    created = json.loads((ARTIFACTS / "run.json").read_bytes())
    assert created["config"]["update"]["learning_rate"] == 0.01
    assert {"grpo", "python", "torch", "transformers", "pyarrow", "duckdb"} <= set(created["versions"])


def test_each_prompt_is_drawn_once_per_pass(finished: Path, grpo: Grpo) -> None:
    query = "select prompt_id, count(*) as n from rollouts group by all order by all"
    rows = json.loads(grpo("sql", query, "--json")[1])
    assert rows == [{"prompt_id": n, "n": 2} for n in range(6)]  # 2 iterations x 3 prompts are the 6 prompts


def test_seeds_are_a_function_of_seed_iteration_group_and_sample(finished: Path, grpo: Grpo) -> None:
    query = "select iteration, group_id, sample_id, seed from rollouts"
    for row in json.loads(grpo("sql", query, "--json")[1]):
        place = f"0/{row['iteration']}/{row['group_id']}".encode()
        first = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest()) % (2**63 - 2**20)
        assert row["seed"] == first + row["sample_id"]


def test_rewards_and_advantages_are_what_they_should_be(finished: Path, grpo: Grpo) -> None:
    query = (
        "select group_id, response, reward, advantage from samples order by iteration, group_id, sample_id"
    )
    rows = json.loads(grpo("sql", query, "--json")[1])
    assert [row["reward"] for row in rows] == [float(sum(map(ord, row["response"])) % 7) for row in rows]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        # Two rewards a, b: r - mean = (a - b) / 2, and the sample deviation is |a - b| / sqrt(2).
        half = (first["reward"] - second["reward"]) / 2
        expected = half / (abs(2 * half) / 2**0.5 + 1e-4)
        assert first["advantage"] == pytest.approx(expected, abs=1e-12)
        assert second["advantage"] == pytest.approx(-expected, abs=1e-12)


def test_run_twice_does_nothing(finished: Path, grpo: Grpo) -> None:
    before = digests()
    assert grpo("run") == (0, "", "run tiny: 2 iterations are complete; nothing to do\n")
    assert grpo("score", "--iteration", "0") == (0, "", "score 0: nothing to do, it is complete\n")
    assert grpo("score") == (0, "", "score: nothing to do; rerun it with --iteration N --force\n")
    assert digests() == before


def test_stage_commands_give_the_bytes_of_run(project: Path, complete: Path, grpo: Grpo) -> None:
    for _ in range(2):
        for stage in STAGES:
            code, _, err = grpo(stage)  # by itself: the next to do
            assert code == 0, err
    assert states(grpo) == DONE
    assert digests() == digests(complete / ARTIFACTS)


def test_until_stops_early_and_a_later_run_goes_on(project: Path, complete: Path, grpo: Grpo) -> None:
    code, out, _ = grpo("run", "--until", "1", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"run": "tiny", "iterations": 1, "worked": 1, "evaluations": [], "stopped": None},
    )
    assert states(grpo) == DONE[:1]
    assert json.loads(grpo("run", "--json")[1])["worked"] == 1
    assert digests() == digests(complete / ARTIFACTS)


# Stale and differs


def test_another_reward_differs_and_is_refused_without_force(finished: Path, grpo: Grpo) -> None:
    before = digests()
    why = 'score.rewards.code.function: "reward:code" -> "reward:length"'
    named = "score.rewards=[{function: 'reward:length', name: code}]"
    assert states(grpo, "--set", named) == [["done", "changed", "done", "done"]] * 2
    assert reasons(grpo, "--set", named) == {"score 0": why, "score 1": why}
    folder = ARTIFACTS / "iteration=000000" / "rewards"
    message = f"error: {folder}: changed ({why}); --force reruns it\n"
    assert grpo("score", "--iteration", "0", "--set", named) == (4, "", message)
    assert digests() == before


def test_a_stage_forced_in_all_iterations_says_once_what_becomes_stale(finished: Path, grpo: Grpo) -> None:
    edit("pipeline.yaml", '"reward:code"', '"reward:length"')
    code, _, err = grpo("score", "--iteration", "all", "--force")
    said = "score: if results change, these become stale: advantages@0, update@0, rollouts@1, advantages@1"
    assert (code, err) == (0, f"{said} and 1 more\nscore 0: 6 rows\nscore 1: 6 rows\n")


def test_a_forced_score_makes_what_follows_stale_and_from_does_it_again(finished: Path, grpo: Grpo) -> None:
    before = digests()
    edit("pipeline.yaml", '"reward:code"', '"reward:length"')
    code, _, err = grpo("score", "--iteration", "0", "--force")
    follow = "advantages@0, update@0, rollouts@1, rewards@1 and 2 more"
    said = f"score 0: if its result changes, these become stale: {follow}\nscore 0: 6 rows\n"
    assert (code, err) == (0, said)
    assert states(grpo) == [["done", "done", "stale", "stale"], ["stale"] * 4]
    assert reasons(grpo) == {
        "advantage 0": "reward/code@0 is gone",
        "update 0": "advantages@0 is stale",
        "generate 1": "policy@1 is stale",
        "score 1": "rollouts@1 is stale",
        "advantage 1": "rollouts@1 is stale",
        "update 1": "policy@1 is stale",
    }
    message = (
        "error: run tiny: advantage of iteration 0 is stale (reward/code@0 is gone); `grpo run --from 0`"
        " reruns it and everything after; `grpo advantage --iteration 0` reruns it alone\n"
    )
    assert grpo("run") == (4, "", message)
    code, _, err = grpo("run", "--from", "0", "--yes")
    assert code == 0, err
    assert states(grpo) == DONE
    after = digests()
    # The rollouts of iteration 0 do not depend on rewards: kept, and the rest is new.
    kept = [name for name in before if name in after]
    assert [name for name in kept if "=000000/rollouts" in name] == [
        name for name in before if "=000000/rollouts" in name
    ]
    assert [name for name in kept if "/advantages/" in name or "/updates-" in name] == []
    weights = "iteration=000001/checkpoint/policy/model.safetensors"
    assert after[weights] != before[weights]


def test_a_stale_stage_is_done_again_by_its_own_command(finished: Path, grpo: Grpo) -> None:
    edit("pipeline.yaml", '"reward:code"', '"reward:length"')
    grpo("score", "--iteration", "0", "--force")
    assert grpo("advantage")[2] == "advantage 0: 6 rows\n"  # the earliest that is not done
    assert states(grpo)[0] == ["done", "done", "done", "stale"]
    assert reasons(grpo)["update 0"] == "advantages@0 changed"


def test_a_reward_of_weight_0_leaves_everything_fresh_and_links_the_rest(finished: Path, grpo: Grpo) -> None:
    edit(
        "pipeline.yaml",
        '- {function: "reward:code"}',
        '- {function: "reward:code"}\n    - {function: "reward:length", weight: 0}',
    )
    assert reasons(grpo) == {f"score {n}": "score.rewards.length: added" for n in range(2)}
    assert grpo("run")[0] == 0  # what differs is history
    before = digests()
    old = [
        [path.stat().st_ino for path in sorted(ARTIFACTS.glob(f"iteration=00000{n}/rewards/*.parquet"))]
        for n in range(2)
    ]
    ids = manifest(0, "rewards")["ids"]["reward/code"]
    code, _, err = grpo("score", "--iteration", "all", "--force")
    assert code == 0, err
    assert states(grpo) == DONE
    for n in range(2):
        new = [path.stat().st_ino for path in sorted(ARTIFACTS.glob(f"iteration=00000{n}/rewards/*.parquet"))]
        assert new[:2] == old[n]  # the shards of `code`: the same files, under new names
        assert set(new[2:]).isdisjoint(old[n])
        assert [file["labels"]["reward"] for file in manifest(n, "rewards")["files"]] == [
            *["code"] * 2,
            *["length"] * 2,
        ]
    assert manifest(0, "rewards")["ids"]["reward/code"] == ids
    assert {k: v for k, v in digests().items() if "/rewards/" not in k} == {
        k: v for k, v in before.items() if "/rewards/" not in k
    }
    query = "select distinct rewards['length'] = len(response) as right from samples"
    assert json.loads(grpo("sql", query, "--json")[1]) == [{"right": True}]
    assert grpo("run")[2] == "run tiny: 2 iterations are complete; nothing to do\n"


def test_a_new_weight_rewrites_without_scoring(project: Path, grpo: Grpo) -> None:
    Path("reward.py").write_text(FAILING)
    assert grpo("run", "--until", "1")[0] == 0
    assert len(Path("calls").read_text().splitlines()) == 3  # one per group
    Path("calls").unlink()
    weight = ("--set", "score.rewards[0].weight=0.5")
    assert reasons(grpo, *weight) == {"score 0": "score.rewards.code.weight: 1.0 -> 0.5"}
    values = "select group_id, sample_id, value, weight from rewards order by all"
    before = json.loads(grpo("sql", values, "--json")[1])
    assert grpo("score", "--iteration", "0", "--force", *weight)[0] == 0
    assert not Path("calls").exists()
    assert json.loads(grpo("sql", values, "--json")[1]) == [{**row, "weight": 0.5} for row in before]
    assert states(grpo, *weight) == [["done", "done", "stale", "stale"]]


@pytest.mark.parametrize("stage", STAGES)
def test_an_identical_redo_leaves_what_follows_fresh(finished: Path, grpo: Grpo, stage: str) -> None:
    output = {"generate": "rollouts", "score": "rewards", "advantage": "advantages"}.get(stage, "update")
    before = manifest(0, output)
    code, _, err = grpo(stage, "--iteration", "0", "--force")
    assert code == 0, err
    after = manifest(0, output)
    assert (before["attempt"], after["attempt"]) == (0, 1)
    assert after["ids"] == before["ids"]
    assert after["fingerprint"] != before["fingerprint"]
    assert states(grpo) == DONE
    assert grpo("run")[2] == "run tiny: 2 iterations are complete; nothing to do\n"


def test_an_edited_key_is_named_and_changes_only_what_comes_next(finished: Path, grpo: Grpo) -> None:
    before = digests()
    edit("pipeline.yaml", "learning_rate: 0.01", "learning_rate: 0.02")
    edit("pipeline.yaml", "iterations: 2", "iterations: 3")
    code, _, err = grpo("run")
    assert code == 0
    assert err.splitlines()[0] == "from iteration 2: update.learning_rate: 0.01 -> 0.02"
    after = digests()
    assert {name: digest for name, digest in after.items() if name in before} == before
    query = "select iteration, learning_rate from updates order by all"
    rates = [row["learning_rate"] for row in json.loads(grpo("sql", query, "--json")[1])]
    assert rates == [0.01, 0.01, 0.02]
    assert states(grpo) == [["done", "done", "done", "changed"]] * 2 + [["done"] * 4]
    assert reasons(grpo)["update 0"] == "update.learning_rate: 0.01 -> 0.02"
    assert grpo("run")[2] == "run tiny: 3 iterations are complete; nothing to do\n"


def test_an_edit_inside_an_iteration_keeps_what_is_committed_there(project: Path, grpo: Grpo) -> None:
    assert grpo("generate")[0] == 0
    before = digests()
    edit("pipeline.yaml", "max_new_tokens: 4", "max_new_tokens: 3")
    code, _, err = grpo("run", "--until", "2")
    assert code == 0, err
    assert "from iteration 1: generate.max_new_tokens: 4 -> 3" in err.splitlines()
    assert before.items() <= digests().items()
    query = "select iteration, max(response_tokens) as longest from rollouts group by all order by all"
    assert [row["longest"] for row in json.loads(grpo("sql", query, "--json")[1])] == [4, 3]


# What is fixed for a run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed: fixed for the run tiny, but changed (0 -> 1)"),
        ("model=./other", "model: fixed for the run tiny, but changed (./model -> ./other (other files))"),
        (
            "update.reference=./other",
            "update.reference: fixed for the run tiny, but changed (./model -> ./other (other files))",
        ),
        (
            "prompts.source=other.jsonl",
            "prompts: fixed for the run tiny, but changed (prompts.source: its file changed)",
        ),
        ("prompts.chat=true", "prompts: fixed for the run tiny, but changed (prompts.chat: false -> true)"),
    ],
)
def test_what_a_run_stands_on_cannot_change(finished: Path, grpo: Grpo, override: str, message: str) -> None:
    shutil.copytree("model", "other")
    edit("other/config.json", '"max_position_embeddings": 64', '"max_position_embeddings": 65')
    Path("other.jsonl").write_text('{"prompt": "9+1="}\n')
    said = f"error: {message}; give the new setting a new `run:` name\n"
    assert grpo("run", "--set", override) == (4, "", said)
    assert grpo("score", "--set", override) == (4, "", said)


def test_a_moved_model_and_moved_prompts_are_accepted_by_their_content(finished: Path, grpo: Grpo) -> None:
    Path("model").rename("moved")
    Path("prompts.jsonl").rename("moved.jsonl")
    code, _, err = grpo(
        "run", "--set", "model=./moved", "--set", "prompts.source=moved.jsonl", "--set", "iterations=3"
    )
    assert code == 0, err


# Rewards that failed


def test_failed_rewards_are_committed_refused_and_scored_again(
    project: Path, complete: Path, grpo: Grpo
) -> None:
    Path("reward.py").write_text(FAILING)
    Path("marker").touch()
    folder = ARTIFACTS / "iteration=000000" / "rewards"
    complaint = (
        "score: iteration 0: 2 of 6 rewards failed (2 error); first: code: RuntimeError: no reward"
        " (reward.py, line 6); the same command scores only those again,"
        " `score.on_error: drop` leaves their rollouts out"
    )
    code, _, err = grpo("run")
    assert (code, err.splitlines()[-1]) == (8, f"error: {complaint}")
    assert states(grpo) == [["done", "partial", "missing", "missing"]]
    assert reasons(grpo)["score 0"] == "2 rewards failed"
    query = "select status, value is null as no_value, count(*) as n from rewards group by all order by all"
    assert json.loads(grpo("sql", query, "--json")[1]) == [
        {"status": "error", "no_value": True, "n": 2},
        {"status": "ok", "no_value": False, "n": 4},
    ]
    refused = (
        f"error: {folder}: 2 rewards failed; `grpo score --iteration 0` tries them again,"
        " `score.on_error: drop` leaves them out\n"
    )
    assert grpo("advantage", "--iteration", "0") == (4, "", refused)
    assert sorted(Path("calls").read_text().splitlines()) == ["2+1= 2", "5+1= 2"]

    Path("calls").unlink()
    code, _, err = grpo("score")  # still failing: tried again, and only what failed
    settled = complaint.replace(
        "the same command scores only those again",
        "2 failed twice in the same way and are not tried again but by `grpo score --only-failed`;"
        " `on_timeout: 0.0` of a reward counts a time-out",
    )
    assert (code, err) == (8, f"error: {settled}\n")
    assert not Path("calls").exists()

    Path("marker").unlink()
    code, _, err = grpo("run")  # twice in the same way is enough
    assert (code, err.splitlines()[-1]) == (8, f"error: {settled}")
    assert not Path("calls").exists()
    assert grpo("score", "--only-failed")[0] == 0
    code, _, err = grpo("run")
    assert code == 0, err
    assert Path("calls").read_text().splitlines()[0] == "3+1= 2"  # in iteration 0 nothing else
    assert len(Path("calls").read_text().splitlines()) == 1 + 3
    assert states(grpo) == DONE
    # A reward that failed at first leaves no trace in the result.
    weights = "iteration=000001/checkpoint/policy/model.safetensors"
    assert digests()[weights] == digests(complete / ARTIFACTS)[weights]


def test_a_repaired_function_is_another_function_and_scores_everything(
    project: Path, complete: Path, grpo: Grpo
) -> None:
    right = Path("reward.py").read_text()
    Path("reward.py").write_text(FAILING)
    Path("marker").touch()
    assert grpo("run")[0] == 8
    before = manifest(0, "rewards")
    Path("reward.py").write_text(right)
    assert states(grpo) == [["done", "partial", "missing", "missing"]]
    code, _, err = grpo("run")
    assert code == 0, err
    after = manifest(0, "rewards")
    assert after["summary"]["statuses"] == {"ok": 6}
    # Values that the old source gave must not be mixed with those of the new one.
    assert after["user_files"] != before["user_files"]
    assert {f["unit"] for f in after["files"]}.isdisjoint(f["unit"] for f in before["files"])
    assert states(grpo) == DONE
    weights = "iteration=000001/checkpoint/policy/model.safetensors"
    assert digests()[weights] == digests(complete / ARTIFACTS)[weights]


def test_on_error_drop_leaves_the_rollouts_out(project: Path, grpo: Grpo) -> None:
    Path("reward.py").write_text(FAILING)
    Path("marker").touch()
    drop = ("--set", "score.on_error=drop")
    code, _, err = grpo("run", "--until", "1", *drop)
    assert code == 0, err
    assert states(grpo, *drop) == DONE[:1]
    query = "select prompt, keep, reason, reward is null as none, advantage is null as no_advantage"
    rows = json.loads(grpo("sql", f"{query} from samples order by group_id, sample_id", "--json")[1])
    left_out = {"prompt": "3+1=", "keep": False, "reason": "unscored", "none": True, "no_advantage": True}
    assert rows[:2] == [left_out, left_out]
    assert [(row["keep"], row["reason"]) for row in rows[2:]] == [(True, None)] * 4
    assert json.loads(grpo("sql", "select rollouts from updates", "--json")[1]) == [{"rollouts": 4}]
    # With `stop` again the same output is partial, and what was made from it has to wait.
    assert states(grpo)[0] == ["done", "partial", "stale", "stale"]
    assert grpo("run")[0] == 4


def test_a_reward_that_cannot_be_used_stops_before_anything_is_sampled(project: Path, grpo: Grpo) -> None:
    code, _, err = grpo("run", "--set", "score.rewards[0].function=reward:nope")
    assert code == 2
    assert "no 'nope' in reward; it has: code, length" in err
    assert not list(ARTIFACTS.glob("iteration=*"))


LORA = "update.lora={rank: 2, alpha: 4}"


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (
            ["update.lora={rank: 2, alpha: 4, targets: [q]}"],
            2,
            "update.lora.targets: 'q' is not a linear module that can take an adapter; of this model these"
            " can: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            ["update.schedule=linear", "iterations=1"],
            2,
            "update.schedule: linear reaches 0 after iterations: 1; found iteration 1; raise `iterations`, or"
            " set schedule: constant",
        ),
    ],
)
def test_what_update_would_refuse_stops_before_anything_is_sampled(
    project: Path, grpo: Grpo, overrides: list[str], code: int, message: str
) -> None:
    options = [part for override in overrides for part in ("--set", override)]
    found, _, err = grpo("run", "--until", "2", *options)
    assert (found, err.splitlines()[-1]) == (code, f"error: {message}")
    assert not list(ARTIFACTS.glob("iteration=*"))


def test_a_missing_peft_stops_before_anything_is_sampled(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = grpo("run", "--set", LORA)
    assert code == 2
    assert err.splitlines()[-1].endswith("; pip install 'grpo-stages[lora]'")
    assert not list(ARTIFACTS.glob("iteration=*"))


def test_a_reference_that_is_not_finite_stops_before_anything_is_sampled(project: Path, grpo: Grpo) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(project / "model", project / "other")
    weights = load_file(project / "other" / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, project / "other" / "model.safetensors", metadata={"format": "pt"})
    code, _, err = grpo("run", "--set", "update.reference=./other")
    assert code == 6
    assert err.splitlines()[-1].endswith(
        "other: weight model.norm.weight holds NaN or infinity; every weight must be finite"
    )
    assert not list(ARTIFACTS.glob("iteration=*"))
    code, _, err = grpo(
        "run", "--until", "1", "--set", "update.reference=./other", "--set", "update.kl_coefficient=0"
    )
    assert code == 0, err  # nobody reads it


# --from, and its end


def test_from_asks_before_it_moves_anything(
    finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", "--from", "0", "--set", "update.learning_rate=0.02"]
    text = "of iteration 0 update and all of iteration 1 will be rerun"
    before = digests(Path("artifacts"))
    code, out, err = grpo(*command)
    assert (code, out, err) == (
        2,
        "",
        f"error: --from 0: {text}; what exists goes to .trash; give --yes too\n",
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda: "n")
    code, out, err = grpo(*command)
    assert (code, err.endswith("error: --from 0: not confirmed; nothing was moved\n")) == (2, True)
    assert digests(Path("artifacts")) == before
    monkeypatch.setattr("builtins.input", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert grpo(*command)[0] == 130
    assert digests(Path("artifacts")) == before
    monkeypatch.setattr("builtins.input", lambda: "y")
    assert grpo(*command)[0] == 0
    assert digests(Path("artifacts")) != before


def test_from_moves_nothing_when_what_comes_before_is_not_whole(finished: Path, grpo: Grpo) -> None:
    shutil.rmtree(ARTIFACTS / "iteration=000000/update")
    before = digests(Path("artifacts"))
    code, _, err = grpo("run", "--yes", "--from", "1", "--set", "update.learning_rate=0.02")
    assert (code, "update of iteration 0 is missing; nothing was moved" in err) == (4, True), err
    assert digests(Path("artifacts")) == before


def test_from_moves_later_iterations_and_what_changed_to_the_trash(finished: Path, grpo: Grpo) -> None:
    before = digests()
    edit("pipeline.yaml", "learning_rate: 0.01", "learning_rate: 0.02")
    code, _, err = grpo("run", "--from", "0", "--yes")
    assert code == 0, err
    assert states(grpo) == DONE
    trash = sorted(path.name for path in (ARTIFACTS / ".trash").iterdir())
    assert [name for name in trash if name.startswith("iteration")] == [
        "iteration=000000-update.0",
        "iteration=000001.0",
    ]
    after = digests()
    same = {name for name in before if after.get(name) == before[name] and name.endswith(".parquet")}
    assert {name.split("/")[1] for name in same if "=000000" in name} == {"rollouts", "rewards", "advantages"}
    assert {name for name in same if "=000001" in name} == set()
    assert after["iteration=000001/checkpoint/policy/model.safetensors"] not in before.values()


@pytest.mark.parametrize("moved", [[], ["iteration=000001"], ["iteration=000001", "iteration=000000/update"]])
def test_from_killed_half_way_is_finished_by_the_next_run(
    finished: Path, grpo: Grpo, moved: list[str]
) -> None:
    edit("pipeline.yaml", "learning_rate: 0.01", "learning_rate: 0.02")
    (ARTIFACTS / ".from.json").write_bytes(seal({"from": 0}))
    (ARTIFACTS / ".trash").mkdir(exist_ok=True)
    for name in moved:
        (ARTIFACTS / name).rename(ARTIFACTS / ".trash" / f"{name.replace('/', '-')}.0")
    code, _, err = grpo("run")
    assert code == 0, err
    assert not (ARTIFACTS / ".from.json").exists()
    assert states(grpo) == DONE
    query = "select learning_rate from updates order by iteration"
    rates = [row["learning_rate"] for row in json.loads(grpo("sql", query, "--json")[1])]
    assert rates == [0.02, 0.02]


FEW = ["--set", "iterations=4", "--set", "checkpoints={every: 1, keep_last: 1}"]


def on_disk(grpo: Grpo, *options: str) -> list[int]:
    found: list[int] = json.loads(grpo("status", "--json", *options)[1])["policies"]["on_disk"]
    return found


def test_a_policy_that_is_not_on_disk_is_rebuilt_and_said(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", *FEW)[0] == 0
    assert on_disk(grpo) == [0, 4]
    before = manifest(3, "update")["ids"]
    code, _, err = grpo("update", "--iteration", "3", "--force", *FEW)
    assert code == 0, err
    line = r"policy 3 is not on disk: rebuilding it from policy 0 \(3 updates, about \d+ s\)"
    assert any(re.fullmatch(line, each) for each in err.splitlines()), err
    assert manifest(3, "update")["ids"] == before
    assert states(grpo, *FEW) == DONE * 2


def test_the_newest_policy_is_on_disk_before_what_it_came_from_is_replaced(
    finished: Path, grpo: Grpo
) -> None:
    assert grpo("run", *FEW)[0] == 0
    shutil.rmtree(ARTIFACTS / "iteration=000003/checkpoint")
    before = manifest(3, "update")["ids"]["policy"]
    code, _, err = grpo("advantage", "--iteration", "1", "--force", *FEW, "--set", "advantage.scale=none")
    assert code == 0, err
    assert "advantage 1: policy 4 came from what is replaced: it is written\n" in err
    assert on_disk(grpo, *FEW) == [0, 4]
    assert manifest(3, "checkpoint")["inputs"]["policy@4"] == before
    code, out, err = grpo("export", "--policy", "3", "--out", "three")
    assert (code, out) == (4, "")
    gone = "policy 3 is not on disk, and cannot be rebuilt: update 1 was made from another advantages@1 than"
    assert err == f"error: {gone} the one that is there; `grpo run --from 1` makes another\n"
    assert grpo("export", "--policy", "4", "--out", "four")[0] == 0


def test_from_goes_on_from_any_policy(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", *FEW)[0] == 0
    before = {name: each for name, each in digests().items() if "checkpoint" not in name}
    code, _, err = grpo("run", "--from", "2", "--yes", *FEW)
    assert code == 0, err
    assert {name: each for name, each in digests().items() if "checkpoint" not in name} == before
    assert on_disk(grpo, *FEW) == [0, 4]


def test_advice_leads_to_a_policy_that_can_be_had(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", *FEW)[0] == 0
    before = digests()
    shutil.rmtree(ARTIFACTS / "iteration=000001")
    code, _, err = grpo("run", *FEW)
    assert (code, "policy 2 is gone: `grpo run --from 1`" in err) == (4, True), err
    code, _, err = grpo("run", "--from", "2", "--yes", *FEW)
    way = "nothing was moved; begin with that: --from 1, or `grpo generate --iteration 1`\n"
    assert (code, err.endswith(way)) == (4, True), err
    assert grpo("run", "--from", "1", "--yes", *FEW)[0] == 0
    assert digests() == before


# What the engine holds, and whose turn it is


def test_a_stale_engine_stops_the_run_and_costs_nothing(
    project: Path, complete: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo.generate.engines.transformers_engine import TransformersEngine

    take = TransformersEngine.take
    held: list[Any] = []

    def stale(self: TransformersEngine, weights: Weights) -> None:
        """The third is the first of the learner's: what is held is policy 0, loaded before."""
        if len(held) == 2:
            return
        take(self, weights)
        held.append(self._model)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "take", stale)
        patch.setattr(TransformersEngine, "release", lambda self: None)
        code, out, err = grpo("run")
    assert (code, out) == (8, "")
    assert re.fullmatch(
        r"error: generate: the engine does not compute the policy as the learner does: \d\.\de-0[123] nats"
        r" per token apart, at most 1\.0e-04 is right in float32; its weights are stale or it is not the same"
        r" model; nothing was sampled",
        err.splitlines()[-1],
    )
    assert states(grpo) == DONE[:1]
    assert not (ARTIFACTS / "iteration=000001").exists()
    assert not list(ARTIFACTS.glob(".staging/**/*.parquet"))
    code, _, err = grpo("run")
    assert code == 0, err
    assert digests() == digests(complete / ARTIFACTS)
    for iteration in (0, 1):
        for output in ("rollouts", "update"):
            undisturbed = complete / ARTIFACTS / f"iteration={iteration:06d}" / output / "manifest.json"
            assert manifest(iteration, output)["ids"] == json.loads(undisturbed.read_bytes())["ids"]


def test_a_stale_engine_stops_a_stage_command_too(
    finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo.generate.engines.transformers_engine import TransformersEngine

    take = TransformersEngine.take

    def stale(self: TransformersEngine, weights: Weights) -> None:
        """What is held is a copy, as an engine on another device has one."""
        if self._model is None:
            take(self, weights)
            self._model = copy.deepcopy(self._model)

    before = digests()
    monkeypatch.setattr(TransformersEngine, "take", stale)
    code, _, err = grpo("generate", "--iteration", "1", "--force")
    assert code == 8
    assert "the engine does not compute a perturbed copy as the learner does" in err.splitlines()[-1]
    assert digests() == before


def test_the_built_in_engine_and_the_learner_agree_to_1e_5(finished: Path, grpo: Grpo) -> None:
    for iteration in (0, 1):
        assert 0 <= manifest(iteration, "rollouts")["summary"]["weight_check_difference"] <= 1e-5
    query = "select mismatch_mean, mismatch_max, ratio_mean, ratio_max from updates where step = 0"
    rows = json.loads(grpo("sql", query, "--json")[1])
    assert len(rows) == 2
    for row in rows:  # one step per iteration: its log-probs are those of the weights that sampled
        assert 0 <= row["mismatch_mean"] <= row["mismatch_max"] <= 1e-5
        assert abs(row["ratio_mean"] - 1) <= 1e-5
        assert abs(row["ratio_max"] - 1) <= 1e-3


def test_a_learning_rate_of_0_leaves_policy_and_weight_check_as_they_are(project: Path, grpo: Grpo) -> None:
    code, _, err = grpo("run", "--set", "update.learning_rate=0")
    assert code == 0, err
    ids = [manifest(iteration, "update")["ids"]["policy"] for iteration in (0, 1)]
    checks = [
        (ARTIFACTS / folder / "weight_check.json").read_bytes()
        for folder in ("policy", "iteration=000000/update", "iteration=000001/update")
    ]
    assert ids[0] != ids[1]  # they came from other rollouts
    weights = [manifest(iteration, "update")["summary"]["weights"] for iteration in (0, 1)]
    assert weights[0] == weights[1]
    assert [manifest(iteration, "update")["summary"]["moved"] for iteration in (0, 1)] == [False, False]
    assert checks[0] == checks[1] == checks[2]
    query = "select mismatch_mean, ratio_max from updates order by iteration"
    for row in json.loads(grpo("sql", query, "--json")[1]):
        assert row["mismatch_mean"] <= 1e-5
        assert abs(row["ratio_max"] - 1) <= 1e-3
