"""`grpo evaluate`: a policy of a run, or a checkpoint that no run knows."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo
from tests.faults import crash

RUN = crash.RUN
NUMBERS = ("prompts", "samples", "pass_at", "pass_at_low", "pass_at_high", "reward", "rewards", "truncated")


def test_a_policy_of_the_run_is_measured_once(measured: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    code, out, err = grpo("evaluate", "--policy", "1", "--json")
    found = json.loads(out)
    assert (code, err, found["run"], found["policy"]) == (0, "", "tiny", 1)
    assert crash.contents(Path()) == before
    [row] = json.loads(grpo("sql", "select * from evals where iteration = 1", "--json")[1])
    assert {name: found[name] for name in NUMBERS} == {name: row[name] for name in NUMBERS}
    assert json.loads(grpo("evaluate", "--json")[1])["policy"] == 2  # the newest


def test_a_policy_that_was_not_measured_is_committed_to_the_run(finished: Path, grpo: Grpo) -> None:
    add = ["--set", "evaluate={prompts: {source: prompts.jsonl}, samples_per_prompt: 2, pass_threshold: 3}"]
    code, out, err = grpo("evaluate", "--policy", "1", *add)
    assert code == 0, err
    lines = [line.strip() for line in out.splitlines() if line.strip(" ─")]
    assert lines[0] == "policy 1 of run tiny: 6 prompts, 2 responses each, temperature 1; pass: code >= 3"
    assert lines[1].split() == ["measure", "value", "95", "%", "interval"]
    names = ["pass@1", "pass@2", "reward", "reward code", "length", "truncated"]
    assert [line.split("  ")[0] for line in lines[2:]] == names
    assert (RUN / "iteration=000001/evaluation/manifest.json").exists()


def test_what_was_measured_otherwise_is_refused_without_force(measured: Path, grpo: Grpo) -> None:
    other = ["--set", "evaluate.samples_per_prompt=2"]
    code, out, err = grpo("evaluate", "--policy", "1", *other)
    place = RUN / "iteration=000001/evaluation"
    changed = "changed (evaluate.samples_per_prompt: 3 -> 2); --force reruns it, `grpo status` shows what"
    changed += " was measured"
    assert (code, out, err) == (4, "", f"error: {place}: {changed}\n")
    assert json.loads(grpo("evaluate", "--policy", "1", "--force", "--json", *other)[1])["samples"] == 8


def test_the_same_policy_as_a_checkpoint_gives_the_same_numbers(measured: Path, grpo: Grpo) -> None:
    before = crash.contents(Path())
    checkpoint = RUN / "iteration=000000/checkpoint/policy"
    code, out, err = grpo("evaluate", str(checkpoint), "--json", "--out", "responses.parquet")
    assert code == 0, err
    found = json.loads(out)
    [row] = json.loads(grpo("sql", "select * from evals where iteration = 1", "--json")[1])
    assert {name: found[name] for name in NUMBERS} == {name: row[name] for name in NUMBERS}
    assert found["checkpoint"] == str(checkpoint.absolute())
    columns = "group_id, sample_id, prompt, response, answer, rewards, reward, passed"
    query = f"select {columns} from eval_samples where iteration = 1 order by group_id, sample_id"
    written = pq.read_table("responses.parquet", columns=columns.split(", "))
    assert written.to_pylist(maps_as_pydicts="strict") == json.loads(grpo("sql", query, "--json")[1])
    # It leaves nothing behind, and the run knows nothing of it.
    assert crash.contents(Path()) == before
    assert list(Path("artifacts/.eval").iterdir()) == []


def test_a_checkpoint_needs_no_run(measured_project: Path, grpo: Grpo) -> None:
    code, out, err = grpo("evaluate", "model")
    assert code == 0, err
    assert out.startswith("model: 4 prompts, 3 responses each, temperature 1; pass: code >= 3\n")
    assert not RUN.exists()
    assert json.loads(grpo("evaluate", "--json")[1])["policy"] == 0  # and this begins the run


def test_a_killed_one_is_gone_on_with(measured_project: Path, grpo: Grpo, tmp_path: Path) -> None:
    operations = crash.recorded(crash.copy(Path(), tmp_path / "counted"), ["evaluate", "model"])
    sidecar = "eval_rollouts-00001-"  # of the second shard: written, synced, renamed
    at = min(n for n, made in enumerate(operations, 1) if re.search(f"{sidecar}.*sidecar", made.path))
    assert crash.in_child(Path(), ["evaluate", "model"], f"kill:{at + 4}")[0] == -9
    [folder] = Path("artifacts/.eval").iterdir()
    shards = [
        path
        for path in folder.rglob("eval_rollouts-*.parquet")
        if path.with_name(f"{path.name}.sidecar.json").exists()
    ]
    assert shards
    assert grpo("evaluate", "model")[0] == 0
    assert not folder.exists()


def test_a_reward_that_cannot_do_with_the_prompts_is_found_before_they_are_sampled(
    measured: Path, grpo: Grpo
) -> None:
    Path("reward.py").write_text("def code(prompts, completions, level):\n    return [1.0]\n")
    code, _, err = grpo("evaluate", "--force")
    assert (code, "level" in err, "engine:" in err) == (2, True, False), err


@pytest.mark.parametrize("checkpoint", ["only", "only/m.gguf"])
def test_a_gguf_is_no_checkpoint(measured: Path, grpo: Grpo, checkpoint: str) -> None:
    Path("only").mkdir()
    Path("only/m.gguf").write_bytes(b"GGUF\3\0\0\0")
    code, out, err = grpo("evaluate", checkpoint)
    assert (code, out) == (4, "")
    assert err.startswith(
        f"error: {measured}/only/m.gguf: GGUF is not read; take the checkpoint that it was made from, or"
    ), err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["none"],
            4,
            "{folder}/none: no such directory; a Hugging Face checkpoint directory is needed",
        ),
        (
            ["model", "--policy", "1"],
            2,
            "evaluate: a checkpoint takes neither --policy nor --force",
        ),
        (
            ["--policy", "7"],
            2,
            "--policy 7: run tiny has policies 0 to 2",
        ),
        (
            ["--out", "x.csv"],
            2,
            "--out x.csv: column rewards is a list or map, which CSV has no place for; use .parquet or .json",
        ),
        (["--out", "x.txt"], 2, "--out x.txt: expected a file ending in .parquet, .csv or .json"),
        (["--out", "none/x.json"], 2, "--out none/x.json: no folder none"),
    ],
)
def test_mistakes(measured: Path, grpo: Grpo, arguments: list[str], code: int, message: str) -> None:
    expected = f"error: {message.format(folder=measured)}\n"
    assert grpo("evaluate", *arguments) == (code, "", expected)
