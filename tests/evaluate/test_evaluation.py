"""Policies are measured while a run trains: what is sampled, what is kept, and what that never touches."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, variance
from typing import Any

import pytest
from tests.conftest import HELD_OUT, Grpo
from tests.faults import crash

from grpo.config import load
from grpo.generate.engines.protocol import group_seed

RUN = crash.RUN


def rows(grpo: Grpo, query: str) -> list[dict[str, Any]]:
    code, out, err = grpo("sql", query, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def states(grpo: Grpo, *options: str) -> dict[int, str]:
    """Policy -> state of its evaluation."""
    document = json.loads(grpo("status", "--json", *options)[1])
    return {row["policy"]: row["state"] for row in document["evaluations"]}


def succeed(grpo: Grpo, *arguments: str) -> str:
    code, _, err = grpo(*arguments)
    assert code == 0, err
    return err


def evaluation(policy: int) -> Path:
    return RUN / f"iteration={policy:06d}" / "evaluation"


def inodes(policy: int) -> set[int]:
    return {path.stat().st_ino for path in evaluation(policy).glob("*.parquet")}


def without_evaluations(contents: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in contents.items() if "/eval" not in name}


# Which policies, and when


def test_policies_are_measured_before_they_sample_and_the_last_one_too(
    measured_project: Path, grpo: Grpo
) -> None:
    err = succeed(grpo, "run", "--set", "iterations=3", "--set", "evaluate.every=2")
    assert re.findall(r"^(policy|iteration) +([0-9]+) ", err, re.M) == [
        *[("policy", "0"), ("iteration", "0"), ("iteration", "1"), ("policy", "2")],
        *[("iteration", "2"), ("policy", "3")],
    ]
    assert [row["iteration"] for row in rows(grpo, "select iteration from evals order by iteration")] == [
        0,
        2,
        3,
    ]
    assert sorted(path.name for path in RUN.glob("iteration=*")) == [f"iteration={n:06d}" for n in range(4)]
    # More iterations: what was the last policy is one of many, and stays measured.
    err = succeed(grpo, "run", "--set", "iterations=5", "--set", "evaluate.every=2")
    assert re.findall(r"^policy +([0-9]+) ", err, re.M) == ["4", "5"]
    assert "nothing to do" in succeed(grpo, "run", "--set", "iterations=5", "--set", "evaluate.every=2")


def test_until_measures_where_it_stops(measured_project: Path, grpo: Grpo) -> None:
    err = succeed(grpo, "run", "--until", "1", "--set", "evaluate.every=100")
    assert re.findall(r"^policy +([0-9]+) ", err, re.M) == ["0", "1"]
    assert "nothing to do" in succeed(grpo, "run", "--until", "0", "--set", "evaluate.every=100")


def test_the_log_and_the_manifest_say_what_the_rewards_add_up_to(measured_project: Path, grpo: Grpo) -> None:
    err = succeed(grpo, "run", "--until", "0")
    query = "select group_id, value, response_tokens from eval_rewards join eval_rollouts using ({})"
    found = rows(grpo, query.format("iteration, group_id, sample_id"))
    assert len(found) == 4 * 3
    values = [[row["value"] for row in found if row["group_id"] == group] for group in range(4)]
    shares = [mean(value >= 3 for value in group) for group in values]
    three = mean(max(group) >= 3 for group in values)
    p = mean(shares)
    assert 0 < p < 1
    assert variance(shares) > 0
    size = max(4, min(12, p * (1 - p) * 4 / variance(shares)))  # Wilson's interval for so many trials
    z = 1.96
    centre, width = p + z**2 / (2 * size), z * math.sqrt(p * (1 - p) / size + z**2 / (4 * size**2))
    low, high = (end / (1 + z**2 / size) for end in (centre - width, centre + width))
    reward, length = (mean(row[name] for row in found) for name in ("value", "response_tokens"))
    assert (
        f"policy       0  pass@1 of code {p:.3f} ({low:.3f} to {high:.3f})  pass@3 {three:.3f}"
        f"  reward {reward:.3f}  length {length:.1f}  "
    ) in err
    [manifest] = rows(grpo, "select summary from manifests where output = 'evaluation'")
    assert json.loads(manifest["summary"])["pass_at"]["3"] == three


# What is sampled


def test_every_policy_answers_the_same_prompts_with_the_same_seeds(measured: Path, grpo: Grpo) -> None:
    found = rows(grpo, "select * exclude (prompt_token_ids) from eval_rollouts order by all")
    assert len(found) == 3 * 4 * 3
    assert all(row["iteration"] == row["policy_iteration"] and row["round"] == 0 for row in found)
    by_policy = [
        [
            (row["group_id"], row["sample_id"], row["prompt_id"], row["prompt"], row["seed"])
            for row in found
            if row["iteration"] == policy
        ]
        for policy in range(3)
    ]
    assert by_policy[0] == by_policy[1] == by_policy[2]
    assert {row[3] for row in by_policy[0]} == {row["prompt"] for row in HELD_OUT}
    assert by_policy[0][0][4] == group_seed(0, "evaluation", 0)
    training = {row["seed"] for row in rows(grpo, "select seed from rollouts")}
    assert not training & {row["seed"] for row in found}
    rewards = rows(grpo, "select count(*) as n, min(iteration) as a, max(iteration) as b from eval_rewards")
    assert rewards == [{"n": 36, "a": 0, "b": 2}]


def test_training_is_the_same_bits_with_and_without(measured: Path, complete: Path) -> None:
    with_it, without = crash.contents(measured), crash.contents(complete)
    assert without_evaluations(with_it) == without
    assert set(with_it) > set(without)


def test_greedy(measured: Path, grpo: Grpo) -> None:
    greedy = ["--set", "evaluate.temperature=0", "--set", "evaluate.samples_per_prompt=1"]
    for policy in ("1", "2"):
        succeed(grpo, "evaluate", "--policy", policy, "--force", *greedy, "--set", "seed=0")
    found = rows(
        grpo, "select temperature, seed, response from eval_rollouts where iteration = 2 order by all"
    )
    assert [row["temperature"] for row in found] == [0.0] * 4
    # The likeliest token each time, whatever the seed: as the engine alone would do.
    assert responses(RUN / "iteration=000001/checkpoint/policy") == [
        row["response"]
        for row in rows(grpo, "select response from eval_rollouts where iteration = 2 order by group_id")
    ]


def responses(checkpoint: Path) -> list[str]:
    """Four tokens, each the likeliest, behind each held-out prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = []
    for row in HELD_OUT:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < start + 4 and (
                ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id
            ):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        found.append(str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)))
    return found


def test_a_limit_of_its_own_for_longer_responses(measured: Path, grpo: Grpo) -> None:
    succeed(grpo, "evaluate", "--force", "--set", "evaluate.max_new_tokens=9")
    [row] = rows(grpo, "select max(response_tokens) as longest from eval_rollouts where iteration = 2")
    assert 4 < row["longest"] <= 9


def test_the_engine_keeps_a_policy_from_its_evaluation_to_its_sampling(
    measured_project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo.generate.engines.transformers_engine import TransformersEngine
    from grpo.models.weights import Weights

    came: list[str] = []
    load, take = TransformersEngine.load, TransformersEngine.take

    def loading(self: TransformersEngine, checkpoint: Path) -> None:
        came.append("disk")
        load(self, checkpoint)

    def taking(self: TransformersEngine, weights: Weights) -> None:
        came.append("memory")
        take(self, weights)

    monkeypatch.setattr(TransformersEngine, "load", loading)
    monkeypatch.setattr(TransformersEngine, "take", taking)
    succeed(grpo, "run")
    # Start and perturbed copy, then policy 0; policies 1 and 2 once each, measured and (1) sampled from.
    assert came == ["memory", "memory", "disk", "memory", "memory"]


# A run that exists


def test_added_to_a_finished_run_the_last_policy_is_measured(finished: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    add = ["--set", "evaluate={prompts: {source: prompts.jsonl}, every: 1}"]
    err = succeed(grpo, "run", *add)
    assert "evaluate.prompts: 6 of 6 are among `prompts`: not held out" in err
    assert re.findall(r"^(policy|iteration) +([0-9]+) ", err, re.M) == [("policy", "2")]
    assert without_evaluations(crash.contents(Path())) == before
    assert "nothing to do" in succeed(grpo, "run", *add)
    # Nothing else takes the last policy's folder for an iteration.
    assert [row["iteration"] for row in json.loads(grpo("status", "--json", *add)[1])["iterations"]] == [0, 1]
    assert succeed(grpo, "generate", *add).startswith("generate: nothing to do")
    assert succeed(grpo, "score", "--iteration", "all", *add).count("nothing to do") == 2
    assert json.loads(grpo("show", "--json")[1])[0]["iteration"] == 1
    assert grpo("verify")[0] == 0
    assert "2 of 2 iterations are complete" in grpo("run", "--dry-run")[2]
    assert "found iteration" not in succeed(grpo, "gc")


def test_held_out_prompts_that_training_draws_too_are_counted(measured_project: Path, grpo: Grpo) -> None:
    row = json.dumps({"prompt": "1+1=", "answer": "2", "more": 1})
    with Path("held_out.jsonl").open("a") as file:
        file.write(row + "\n")
    err = succeed(grpo, "run", "--until", "0")
    assert "evaluate.prompts: 1 of 5 are among `prompts`: not held out\n" in err


def test_other_prompts_are_for_what_comes_next(measured: Path, grpo: Grpo) -> None:
    before = {policy: inodes(policy) for policy in range(3)}
    Path("held_out.jsonl").write_text('{"prompt": "5+3=", "answer": "8"}\n')
    err = succeed(grpo, "run", "--set", "iterations=3")
    assert "from the next evaluation: evaluate.prompts: its file changed\n" in err
    assert re.findall(r"^(policy|iteration) +([0-9]+) ", err, re.M) == [("iteration", "2"), ("policy", "3")]
    assert {policy: inodes(policy) for policy in range(3)} == before
    assert states(grpo) == {0: "changed", 1: "changed", 2: "changed", 3: "done"}
    found = rows(
        grpo,
        "select iteration, count(*) as n, count(answer) as answers from eval_samples"
        " group by iteration order by iteration",
    )
    # Which answers were right is known of the present prompts alone.
    assert [(row["n"], row["answers"]) for row in found] == [(12, 0), (12, 0), (12, 0), (3, 3)]
    assert grpo("verify")[0] == 0
    assert json.loads(grpo("verify", "--json")[1])["stale"] == []


def test_prompts_that_are_gone_were_copied(measured: Path, grpo: Grpo) -> None:
    Path("held_out.jsonl").unlink()
    err = succeed(grpo, "run", "--set", "iterations=3")
    assert "evaluate.prompts.source: held_out.jsonl is gone; the run has its own copy\n" in err
    assert states(grpo) == dict.fromkeys(range(4), "done")


def test_taken_out_of_the_configuration_what_was_measured_stays(measured: Path, grpo: Grpo) -> None:
    off = ["--set", "evaluate=null"]
    err = succeed(grpo, "run", "--set", "iterations=3", *off)
    assert re.findall(r"^policy +([0-9]+) ", err, re.M) == []
    assert states(grpo, *off) == {0: "changed", 1: "changed", 2: "changed"}
    assert "policies, 0 to 2: evaluate changed: evaluate: is not configured" in grpo("status", *off)[1]
    assert len(rows(grpo, "select * from evals")) == 3
    assert grpo("verify", *off)[0] == 0
    code, _, err = grpo("evaluate", *off)
    assert (code, err) == (
        2,
        "error: evaluate: is not configured; say in `evaluate.prompts.source` what to measure with\n",
    )


def test_a_policy_that_is_made_again_is_measured_again(measured: Path, grpo: Grpo) -> None:
    other = ["--set", "update.learning_rate=0.02"]
    kept = inodes(1)
    succeed(grpo, "update", "--iteration", "1", "--force", *other)
    assert states(grpo, *other) == {0: "done", 1: "done", 2: "stale"}
    assert json.loads(grpo("verify", "--json")[1])["stale"] == ["evaluation of policy 2: policy@2 changed"]
    # Of the last policy nothing else is there, and so this is no reason to refuse.
    assert re.findall(r"^policy +([0-9]+) ", succeed(grpo, "run", *other), re.M) == ["2"]
    assert states(grpo, *other) == dict.fromkeys(range(3), "done")
    assert inodes(1) == kept


def test_from_takes_the_evaluations_of_later_policies_along(measured: Path, grpo: Grpo) -> None:
    succeed(grpo, "run", "--set", "iterations=3")
    kept = {policy: inodes(policy) for policy in (0, 1)}
    gone = inodes(2) | inodes(3)
    new = ["--set", "iterations=3", "--set", "update.learning_rate=0.02"]
    assert grpo("run", "--from", "1", *new)[2].startswith(
        "error: --from 1: of iteration 1 update and all of iteration 2 and the evaluation of policy 3"
        " will be rerun;"
    )
    err = succeed(grpo, "run", "--from", "1", "--yes", *new)
    assert re.findall(r"^policy +([0-9]+) ", err, re.M) == ["2", "3"]
    assert {policy: inodes(policy) for policy in (0, 1)} == kept
    assert not gone & (inodes(2) | inodes(3))
    assert gone <= {path.stat().st_ino for path in (RUN / ".trash").rglob("*.parquet")}
    assert grpo("verify")[0] == 0


def test_from_leaves_the_last_evaluation_where_the_policy_stays(measured: Path, grpo: Grpo) -> None:
    before = inodes(2)
    assert "nothing to do" in succeed(grpo, "run", "--from", "1")
    assert inodes(2) == before
    # Measured otherwise: that of policy 1 goes, since it is sampled from again, and is made anew.
    new = ["--set", "evaluate.pass_threshold=1.0", "--set", "generate.temperature=0.9"]
    err = succeed(grpo, "run", "--from", "1", "--yes", *new)
    assert re.findall(r"^policy +([0-9]+) ", err, re.M) == ["1", "2"]
    assert states(grpo, *new) == {0: "changed", 1: "done", 2: "done"}


def test_from_leaves_how_a_policy_was_measured_where_its_rollouts_stay(measured: Path, grpo: Grpo) -> None:
    before = inodes(1)
    new = ["--set", "score.rewards[0].weight=2.0"]
    err = succeed(grpo, "run", "--from", "1", "--yes", *new)
    assert re.findall(r"^policy +([0-9]+) ", err, re.M) == ["2"]
    assert inodes(1) == before
    assert states(grpo, *new) == {0: "changed", 1: "changed", 2: "done"}
    assert grpo("verify")[0] == 0


def test_what_a_forced_stage_makes_stale_names_evaluations(measured: Path, grpo: Grpo) -> None:
    err = succeed(grpo, "update", "--iteration", "0", "--force")
    assert "become stale: evaluation@1, rollouts@1, rewards@1, advantages@1 and 2 more" in err


def test_a_fork_shares_what_the_shared_policies_were_measured_to_be(measured: Path, grpo: Grpo) -> None:
    fork = Path("artifacts/other")
    succeed(grpo, "fork", "tiny", "other", "--iteration", "1", "--set", "evaluate.pass_threshold=2.0")
    # Policy 1 was measured in another way than the fork would, and its rollouts are shared too.
    measured_there = [path.parent.name for path in sorted(fork.glob("*/evaluation"))]
    assert measured_there == ["iteration=000000", "iteration=000001"]
    for path in [*fork.glob("iteration=00000[01]/evaluation/*"), *fork.glob("eval_prompts/*")]:
        assert path.samefile(RUN / path.relative_to(fork))
    options = ["--set", "run=other", "--set", "evaluate.pass_threshold=2.0"]
    assert re.findall(r"^policy +([0-9]+) ", succeed(grpo, "run", *options), re.M) == ["2"]
    assert grpo("verify", "other")[0] == grpo("verify", "tiny")[0] == 0
    hotter = ["--iteration", "1", "--set", "evaluate.pass_threshold=2.0", "--set", "generate.temperature=0.9"]
    succeed(grpo, "fork", "tiny", "hotter", *hotter)  # samples policy 1 anew, and so measures it anew
    assert not Path("artifacts/hotter/iteration=000001").exists()
    succeed(grpo, "fork", "tiny", "same")
    assert len(list(Path("artifacts/same").glob("*/evaluation"))) == 3
    assert "nothing to do" in succeed(grpo, "run", "--set", "run=same")


def test_checkpoints_go_and_evaluations_stay(measured: Path, grpo: Grpo) -> None:
    keep = ["--set", crash.KEEP_2, "--set", "checkpoints.keep_best=false", "--set", "iterations=4"]
    succeed(grpo, "run", *keep)
    assert not (RUN / "iteration=000000/checkpoint").exists()
    assert states(grpo, *keep) == dict.fromkeys(range(5), "done")
    assert grpo("verify")[0] == 0
    query = "select * from evals where iteration = 1"
    before = rows(grpo, query)
    err = succeed(grpo, "evaluate", "--policy", "1", "--force", *keep)
    assert "policy 1 is not on disk: rebuilding it from policy 0 (1 update, about" in err
    assert rows(grpo, query) == before
    assert len(rows(grpo, "select * from evals")) == 5
    assert succeed(grpo, "gc", *keep) == ""


FEW = [
    *("--set", "checkpoints={every: 9, keep_last: 1}"),
    *("--set", "iterations=4", "--set", "stop.metric=reward"),
]


def on_disk(grpo: Grpo) -> list[int]:
    found: list[int] = json.loads(grpo("status", "--json")[1])["policies"]["on_disk"]
    return found


def best_measured(grpo: Grpo, policies: set[int]) -> int:
    found = rows(grpo, "select iteration, reward from evals order by reward desc, iteration")
    return int(next(row["iteration"] for row in found if row["iteration"] in policies))


def test_the_best_policy_measured_is_on_disk(measured_project: Path, grpo: Grpo) -> None:
    """As it was measured, not at the end: with one checkpoint a run, it would be gone by then."""
    succeed(grpo, "run", *FEW)
    best = best_measured(grpo, {0, 1, 2, 3, 4})
    assert on_disk(grpo) == sorted({0, best, 4})
    code, out, _ = grpo("export", "--best", "--out", "best", "--json", "-c", "pipeline.yaml")
    assert code == 0, out
    shutil.rmtree("artifacts")
    succeed(grpo, "run", *FEW, "--set", "checkpoints.keep_best=false")
    assert on_disk(grpo) == [0, 4]


def test_a_policy_measured_by_hand_is_on_disk_where_it_is_the_best(
    measured_project: Path, grpo: Grpo
) -> None:
    """Rebuilt to be measured; one that is not the best is as it was."""
    succeed(grpo, "run", *FEW, "--set", "evaluate.every=9")  # policies 0 and 4 are measured
    for policy in (1, 2, 3):
        assert policy not in on_disk(grpo)
        err = succeed(grpo, "evaluate", "--policy", str(policy), *FEW)
        assert f"policy {policy} is not on disk: rebuilding it from policy " in err
        best = best_measured(grpo, {0, *range(1, policy + 1), 4})
        assert (policy in on_disk(grpo)) == (best == policy)
        assert 4 in on_disk(grpo)


# Faults


def test_killed_anywhere_nothing_is_sampled_twice_and_the_bytes_are_the_same(
    measured: Path, grpo: Grpo, tmp_path: Path
) -> None:
    expected = crash.contents(Path())
    for policy in (0, 1, 2):
        shutil.rmtree(evaluation(policy))
    shutil.rmtree(RUN / "eval_prompts")
    command = ["evaluate", "--policy", "1"]
    count = len(crash.recorded(crash.copy(Path(), tmp_path / "counted"), command))
    for number in range(12, count, 17):
        folder = crash.copy(Path(), tmp_path / "killed")
        assert crash.in_child(folder, command, f"kill:{number}")[0] == -9
        shards = crash.finished_shards(folder)
        crash.succeed(folder, *command)
        now = crash.finished_shards(folder)
        assert {name: now.get(name) for name in shards} == shards, number
        found = crash.contents(folder)
        assert {n: v for n, v in found.items() if "/eval" in n} == {
            n: v for n, v in expected.items() if "eval_prompts" in n or "000001/eval" in n
        }


def failing(reward: str) -> None:
    """Replace the reward: it fails on held-out prompts (x+2=), by the text given."""
    Path("reward.py").write_text(
        "def code(prompts, completions, **columns):\n"
        f"    {reward}\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )


def test_rewards_that_fail_stop_the_run_and_are_tried_again_alone(measured_project: Path, grpo: Grpo) -> None:
    failing("if prompts[0] == '3+2=': raise ValueError('down')")
    code, _, err = grpo("run", "--until", "0")
    message = "evaluate: policy 0: 3 of 12 rewards failed (3 error); first: code: ValueError: down"
    assert (code, message in err) == (8, True), err
    assert states(grpo) == {0: "partial"}
    [row] = rows(grpo, "select unscored, pass_at from evals")
    assert row["unscored"] == 3
    kept = {path.stat().st_ino for path in evaluation(0).glob("eval_rollouts-*")}
    scored = {path.stat().st_ino for path in evaluation(0).glob("eval_rewards-0000[0-2]-*")}
    assert len(kept) == 4
    assert len(scored) == 3
    failing("if prompts[0] == '3+2=': open('asked', 'a').write('x')")  # another file: another reward
    drop = ["--set", "score.on_error=drop"]
    assert grpo("run", "--until", "0", *drop)[0] == 0  # differs, and is history
    assert states(grpo, *drop) == {0: "changed"}
    failing("if prompts[0] == '3+2=': raise ValueError('down')")
    code, _, err = grpo("run", "--until", "1")
    assert (code, message in err) == (8, True)  # nothing is sampled of a policy that is half measured
    assert kept == {path.stat().st_ino for path in evaluation(0).glob("eval_rollouts-*")}
    assert scored == {path.stat().st_ino for path in evaluation(0).glob("eval_rewards-0000[0-2]-*")}
    assert succeed(grpo, "run", "--until", "1", *drop).count("unscored") == 1  # of policy 1


def test_a_reward_that_cannot_do_with_the_held_out_prompts_stops_before_anything_is_sampled(
    measured_project: Path, grpo: Grpo
) -> None:
    Path("reward.py").write_text("def code(prompts, completions, answer, level):\n    return [1.0]\n")
    with Path("prompts.jsonl").open("w") as file:
        file.write('{"prompt": "1+1=", "answer": "2", "level": 1}\n')
    code, _, err = grpo("run")
    assert (code, "level" in err) == (2, True), err
    assert not list(RUN.glob("iteration=*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "evaluate.prompts: prompts.source: held_out.jsonl: holds no prompt that can be used"),
        (
            '{"question": "x"}\n',
            "evaluate.prompts: {folder}/held_out.jsonl:1: no column prompt; found question",
        ),
        (None, "evaluate.prompts: prompts.source: {folder}/held_out.jsonl: no such file"),
    ],
)
def test_held_out_prompts_that_are_no_use(
    measured_project: Path, grpo: Grpo, content: str | None, message: str
) -> None:
    path = Path("held_out.jsonl")
    path.unlink() if content is None else path.write_text(content)
    code, _, err = grpo("run")
    assert code == 3
    assert err.startswith(f"error: {message.format(folder=measured_project)}"), err


@pytest.mark.parametrize("table", ["eval_rollouts", "eval_rewards"])
def test_a_damaged_evaluation_is_named_and_made_again(measured: Path, grpo: Grpo, table: str) -> None:
    before = crash.contents(Path())
    path = sorted(evaluation(2).glob(f"{table}-*.parquet"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, out, _ = grpo("verify", "--json", "--discard")
    [damage] = json.loads(out)["damaged"]
    assert (code, damage["redo"]) == (6, "grpo evaluate --policy 2")
    assert damage["found"] == f"{path}: content changed since it was committed (sha256 differs)"
    assert not evaluation(2).exists()
    succeed(grpo, "evaluate", "--policy", "2")
    assert crash.contents(Path()) == before
    assert grpo("verify")[0] == 0


def test_held_out_prompts_that_are_gone_are_missed(measured: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    shutil.rmtree(RUN / "eval_prompts")
    code, out, _ = grpo("verify", "--json")
    [damage] = json.loads(out)["damaged"]
    gone = f"{RUN}/eval_prompts: gone, though evaluation of iteration 0 was made from it"
    assert (code, damage) == (6, {"found": gone, "redo": "grpo run"})
    succeed(grpo, "run")
    assert crash.contents(Path()) == before
    assert grpo("verify")[0] == 0


def test_rows_of_another_policy_break_an_invariant(measured: Path, grpo: Grpo) -> None:
    rewrite(evaluation(1), "policy_iteration", 0)
    found = json.loads(grpo("verify", "--json")[1])
    assert found["broken"] == {"eval_rollouts: sampled by another policy than measured": 12}
    rewrite(evaluation(2), "sample_id", 0)
    broken = json.loads(grpo("verify", "--json")[1])["broken"]
    assert broken["rollouts: a key occurs twice"] == 8  # four groups of three, twice too many
    assert broken["rewards: of a rollout that is not there"] == 8


def rewrite(folder: Path, column: str, value: int) -> None:
    """Put `value` into every row of a column of eval_rollouts, with sizes and digests that fit."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    from grpo import tables
    from grpo.artifacts.manifest import seal

    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    for record in manifest["files"]:
        if record["table"] == "eval_rollouts":
            data = pq.read_table(folder / record["name"])
            index = data.schema.get_field_index(column)
            data = data.set_column(index, data.schema.field(index), pa.array([value] * len(data), pa.int32()))
            content = tables.encode(data)
            (folder / record["name"]).write_bytes(content)
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(seal(manifest))


def test_abandoned_work_on_an_evaluation_is_garbage(measured: Path, grpo: Grpo) -> None:
    command = ["evaluate", "--policy", "1", "--force", "--set", "evaluate.samples_per_prompt=2"]
    assert crash.in_child(Path(), command, "kill:14")[0] == -9
    [begun] = (RUN / ".staging/iteration=000001").iterdir()
    found = json.loads(grpo("gc", "--json")[1])["garbage"]
    assert [(row["what"], row["path"]) for row in found] == [("abandoned staging", str(begun))]
    assert grpo("verify")[0] == 0


# Configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["evaluate.temperature=0"],
            "pipeline.yaml with --set: evaluate: samples_per_prompt: 3 at temperature 0 would be the same"
            " response each time; set it to 1, or give a temperature",
        ),
        (
            ["evaluate.temperature=0.001"],
            "--set evaluate.temperature: must be 0 (greedy) or at least 0.01, found 0.001",
        ),
        (
            ["evaluate.pass_reward=cod"],
            "pipeline.yaml with --set: evaluate.pass_reward: no reward is named cod; there are code",
        ),
        (["evaluate.evry=3"], "--set evaluate.evry: unknown key; did you mean every?"),
        (["evaluate={every: 3}"], "--set evaluate.prompts: is required and missing"),
        (
            ["evaluate.every=0"],
            "--set evaluate.every: expected at least 1, found 0; write evaluate: null, for none",
        ),
    ],
)
def test_mistakes_in_the_section(
    measured_project: Path, grpo: Grpo, settings: Sequence[str], message: str
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    assert grpo("run", *options) == (2, "", f"error: {message}\n")


def test_null_is_as_in_training(measured_project: Path) -> None:
    from grpo.artifacts import ActiveRun
    from grpo.console import Console
    from grpo.evaluate.plan import settings

    config = load(Path("pipeline.yaml"), ["generate.temperature=0.7"])
    assert settings(ActiveRun(Path(), config, Path(), Console(quiet=True))) == {
        "samples_per_prompt": 3,
        "temperature": 0.7,
        "max_new_tokens": 4,
        "pass_reward": "code",
        "pass_threshold": 3.0,
    }
