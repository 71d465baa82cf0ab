"""A judge as a reward of the real stage: what is kept, what is asked again, what is not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.score.judge.endpoint import Endpoint, Reply, fails, says, serve
from tests.score.test_score_stage import PROMPTS, SCORE, calls, failed, opened, reward, rows, scored, values

from grpo import tables
from grpo.artifacts import ActiveRun, Run
from grpo.config import JudgeConfig
from grpo.errors import InputError, Interrupted, ResourceError, UsageError
from grpo.pipeline import work
from grpo.score.judge import answers
from grpo.score.judge.rubric import read_score
from grpo.score.outcome import Outcome
from grpo.score.scorers import open_scorers, renew_rubrics

RUBRIC = "{prompt} should be {answer}, is {response}"
LENGTHS = [1.0, 2.0, 1.0, 4.0, 0.0, 2.0]  # of the responses "7" "34" "5" "five" "" "10"


def score_length(question: str, request: dict[str, Any]) -> Reply:
    """Length of the response."""
    return says(f"Because.\nScore: {len(question.rpartition('is ')[2])}")


def judge(endpoint: Endpoint, name: str = "judge", weight: float = 1.0, **keys: Any) -> dict[str, Any]:
    config = {"url": endpoint.url, "model": "judge-1", "rubric": RUBRIC, "retries": 0, "concurrency": 2}
    return {"judge": {**config, **keys}, "name": name, "weight": weight, "timeout_s": 5.0}


def judgements(run: Run) -> list[dict[str, Any]]:
    return list(run.read("judgements", 0).to_pylist())


def questions(endpoint: Endpoint) -> list[str]:
    """The responses that were asked about since the last look, in order of their text."""
    found = sorted(one.question.rpartition("is ")[2] for one in endpoint.asked)
    endpoint.forget()
    return found


def test_every_answer_is_a_row_of_judgements(tmp_path: Path) -> None:
    with serve(score_length) as endpoint:
        run = opened(tmp_path, reward("length"), judge(endpoint, weight=0.5))
        manifest = scored(run)
        assert sorted(one.question for one in endpoint.asked)[:2] == [
            "1+9= should be 10, is ",
            "1+9= should be 10, is 10",
        ]
    assert values(run, "judge") == LENGTHS
    assert {row["weight"] for row in rows(run) if row["name"] == "judge"} == {0.5}
    found = judgements(run)
    assert run.read("judgements", 0).schema.equals(tables.schema("judgements"))
    assert [(row["group_id"], row["sample_id"]) for row in found] == [
        (g, s) for g in range(3) for s in range(2)
    ]
    assert found[1] == {
        **{"iteration": 0, "group_id": 0, "sample_id": 1, "name": "judge", "status": "ok", "error": None},
        **{"answer": "Because.\nScore: 2", "model": "judge-1", "finish_reason": "stop"},
        **{"prompt_tokens": 7, "answer_tokens": 3, "attempts": 1},
    }
    files = [(file.table, file.labels["reward"], file.rows) for file in manifest.files]
    assert files == [
        *[
            ("rewards", "length", 4),
            ("rewards", "length", 2),
            ("rewards", "judge", 4),
            ("rewards", "judge", 2),
        ],
        *[("judgements", "judge", 4), ("judgements", "judge", 2)],
    ]
    assert manifest.files[-1].labels["rubric"] == RUBRIC  # what was asked can be read later
    # What held the answers on their way is gone.
    held = {file.name for file in manifest.files} | {"manifest.json", "timings.json"}
    assert {path.name for path in run.folder("rewards", 0).iterdir()} == held


def test_failures_are_rows_and_only_they_are_asked_again(tmp_path: Path) -> None:
    broken = True

    def answer(question: str, request: dict[str, Any]) -> Reply:
        said = question.rpartition("is ")[2]
        if broken and said == "34":
            return fails(500, "out of order")
        return says("I cannot say.") if broken and said == "five" else score_length(question, request)

    with serve(answer) as endpoint:
        run = opened(tmp_path, judge(endpoint), reward("length"))
        message = failed(run)
        assert "2 of 12 rewards failed (2 error); first: judge: Error code: 500" in message
        assert questions(endpoint) == ["", "10", "34", "5", "7", "five"]
        assert [row["status"] for row in judgements(run)] == ["ok", "error", "ok", "ok", "ok", "ok"]
        assert judgements(run)[1]["answer"] is None
        assert judgements(run)[3]["answer"] == "I cannot say."  # an answer, though no score
        assert rows(run)[3]["error"] == "the judge's answer has no score: 'I cannot say.'"
        calls(tmp_path, "length")
        broken = False
        scored(run)
        assert questions(endpoint) == ["34", "five"]
        assert calls(tmp_path, "length") == []
    assert values(run, "judge") == LENGTHS
    assert [row["status"] for row in judgements(run)] == ["ok"] * 6


def test_another_reading_of_the_answers_asks_nothing(tmp_path: Path) -> None:
    with serve(score_length) as endpoint:
        scored(opened(tmp_path, judge(endpoint)))
        endpoint.forget()
        run = opened(tmp_path, judge(endpoint, scale=[0.0, 4.0]))
        scored(run, force=True)
        assert values(run, "judge") == [length / 4 for length in LENGTHS]
        # "Because." is 1 for all.
        run = opened(tmp_path, judge(endpoint, pattern="^(Because)", grades={"Because": 1.0}, weight=2.0))
        scored(run, force=True)
        assert values(run, "judge") == [1.0] * 6
        run = opened(tmp_path, judge(endpoint, name="renamed"))
        scored(run, force=True)
        assert values(run, "renamed") == LENGTHS
        assert {row["name"] for row in judgements(run)} == {"renamed"}
        # A pattern that finds nothing: the answers stay, and the next reading finds them.
        failed(opened(tmp_path, judge(endpoint, pattern="(nothing)")), force=True)
        run = opened(tmp_path, judge(endpoint))
        scored(run, force=True)
        assert values(run, "judge") == LENGTHS
        assert questions(endpoint) == []


@pytest.mark.parametrize(
    "change", [{"model": "judge-2"}, {"rubric": "Rate {response}"}, {"temperature": 1.0}, {"max_tokens": 9}]
)
def test_another_question_is_asked(tmp_path: Path, change: dict[str, Any]) -> None:
    with serve(score_length) as endpoint:
        scored(opened(tmp_path, judge(endpoint)))
        endpoint.forget()
        scored(opened(tmp_path, judge(endpoint, **change)), force=True)
        assert len(endpoint.asked) == 6


def test_the_way_to_the_endpoint_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    with serve(score_length) as endpoint:
        manifest = scored(opened(tmp_path, judge(endpoint)))
        moved: dict[str, Any] = {"url": "http://other:1/v1", "concurrency": 9, "retries": 9}
        moved["requests_per_minute"] = 9.0
        assert scored(opened(tmp_path, judge(endpoint, **moved, api_key_env="KEY"))) == manifest
    for path in (tmp_path / "artifacts").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_force_with_nothing_changed_asks_anew(tmp_path: Path) -> None:
    with serve(score_length) as endpoint:
        run = opened(tmp_path, judge(endpoint))
        scored(run)
        scored(run, force=True)
        assert len(endpoint.asked) == 12


def test_an_unchanged_judge_beside_a_new_reward_is_kept_with_its_answers(tmp_path: Path) -> None:
    with serve(score_length) as endpoint:
        scored(opened(tmp_path, judge(endpoint)))
        endpoint.forget()
        run = opened(tmp_path, judge(endpoint), reward("length"))
        scored(run, force=True)
        assert questions(endpoint) == []
    assert [row["answer"][-1] for row in judgements(run)] == ["1", "2", "1", "4", "0", "2"]


def test_a_rubric_that_was_edited_is_the_one_that_is_asked(tmp_path: Path) -> None:
    """By the same command, which opened the judge with the one before."""
    (tmp_path / "rubric.md").write_text(RUBRIC)
    with serve(score_length) as endpoint:
        run = opened(tmp_path, judge(endpoint, rubric="rubric.md"))
        with open_scorers(run, None) as scorers:
            (tmp_path / "rubric.md").write_text(f"Now: {RUBRIC}")
            renew_rubrics(run, scorers)
            assert scorers.judges["judge"].rubric == f"Now: {RUBRIC}"


def test_without_an_answer_a_rubric_that_wants_one_does_not_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROMPTS[1], "answer", None)
    with serve(score_length) as endpoint:
        run = opened(tmp_path, judge(endpoint))
        scored(run)
    statuses = [row["status"] for row in rows(run)]
    assert statuses == ["ok", "ok", "not_applicable", "not_applicable", "ok", "ok"]
    assert len(judgements(run)) == 4


def test_a_signal_keeps_what_was_answered(tmp_path: Path) -> None:
    def answer(question: str, request: dict[str, Any]) -> Reply:
        if len(endpoint.asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score_length(question, request)

    with serve(answer) as endpoint:
        run = opened(tmp_path, judge(endpoint, concurrency=1))
        with pytest.raises(Interrupted), run.console.signals():
            scored(run)
        assert 0 < len(endpoint.asked) < 6
        again = opened(tmp_path, judge(endpoint, concurrency=1))
        scored(again)
        assert max(endpoint.answered().values()) == 1
        assert len(endpoint.asked) == 6
    assert values(again, "judge") == LENGTHS


def test_a_signal_is_heard_before_the_next_answer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern may take its second with each: the answers that are there are not all read first."""
    seen: list[str] = []

    def signalled(config: JudgeConfig, answer: str) -> Outcome:
        seen.append(answer)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return read_score(config, answer)

    monkeypatch.setattr(answers, "read_score", signalled)
    with serve(score_length) as endpoint:
        run = opened(tmp_path, judge(endpoint))
        with pytest.raises(Interrupted), run.console.signals():
            scored(run)
        assert len(seen) == 2  # of four in the first shard
        scored(opened(tmp_path, judge(endpoint)))
        assert len(endpoint.asked) == 6  # no question twice


def test_a_killed_score_asks_only_what_was_under_way(tmp_path: Path) -> None:
    """Two at a time, a third of a second each: what was answered a second before the kill is on disk."""

    def answer(question: str, request: dict[str, Any]) -> Reply:
        time.sleep(0.3)
        return score_length(question, request)

    with serve(answer) as endpoint:
        run = opened(tmp_path, judge(endpoint, concurrency=1))
        arguments = [str(tmp_path), run.config.model_dump_json()]
        worker = subprocess.Popen([sys.executable, "-c", SCORE, *arguments], stderr=subprocess.DEVNULL)
        staged = tmp_path / "artifacts" / "r" / ".staging"
        while not any(staged.rglob("answers-*.sidecar.json")):
            assert worker.poll() is None
            time.sleep(0.01)
        worker.kill()
        worker.wait()
        before = endpoint.answered()
        assert 1 <= len(before) < 6
        run = opened(tmp_path, judge(endpoint, concurrency=1))
        scored(run)
        twice = [question for question, number in endpoint.answered().items() if number > 1]
        assert len(twice) <= 1
        assert len(before) >= 3  # or nothing would have been kept
    assert values(run, "judge") == LENGTHS


def test_a_full_disk_ends_it_with_what_was_answered(tmp_path: Path) -> None:
    def answer(question: str, request: dict[str, Any]) -> Reply:
        time.sleep(0.4)  # so that answers come in several batches
        return score_length(question, request)

    with serve(answer) as endpoint:
        run = opened(tmp_path, judge(endpoint, concurrency=1))
        arguments = [sys.executable, "-c", SCORE, str(tmp_path), run.config.model_dump_json()]
        # A batch takes about ten operations: the twentieth is in the second one.
        environment = {**os.environ, "GRPO_FAULT": "ENOSPC:20"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert done.returncode == ResourceError.exit_code
        assert "No space left on device" in done.stderr.splitlines()[-1]
        for noise in ("Exception ignored", "never retrieved", "never awaited", "destroyed"):
            assert noise not in done.stderr
        asked = len(endpoint.asked)
        assert asked < 6
        scored(run)
        assert len(endpoint.asked) < asked + 6  # the first batch was kept
    assert values(run, "judge") == LENGTHS


# ---- only what failed ----


def only_failed(run: ActiveRun, wanted: str = "") -> list[dict[str, Any]]:
    return work.run_stage(run, "score", wanted, force=False, only_failed=True)


def test_only_failed_tries_what_was_dropped(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    run = opened(tmp_path, reward("fails_on_words"), reward("length"), on_error="drop")
    scored(run)
    assert values(run, "fails_on_words") == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    calls(tmp_path, "fails_on_words"), calls(tmp_path, "length")
    assert [each["done"] for each in only_failed(run)] == [True]
    assert (calls(tmp_path, "fails_on_words"), calls(tmp_path, "length")) == ([1], [])
    (tmp_path / "broken").unlink()
    only_failed(run, "0")
    assert calls(tmp_path, "fails_on_words") == [1]
    assert values(run, "fails_on_words") == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]  # the others are those of then
    assert only_failed(run) == []
    assert calls(tmp_path, "fails_on_words") == []


def test_only_failed_with_a_longer_time_out(tmp_path: Path) -> None:
    failed(opened(tmp_path, reward("hangs_on_words", timeout_s=0.5)))
    run = opened(tmp_path, reward("hangs_on_words", timeout_s=0.6), on_error="drop")
    only_failed(run)
    assert rows(run)[3]["error"].startswith("no result within 0.6 s")


def test_only_failed_refuses_to_keep_what_would_be_made_otherwise(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    scored(opened(tmp_path, reward("fails_on_words"), on_error="drop"))
    run = opened(tmp_path, reward("fails_on_words", weight=2.0), on_error="drop")
    with pytest.raises(InputError) as caught:
        only_failed(run)
    assert str(caught.value) == (
        f"{run.folder('rewards', 0)}: changed (score.rewards.fails_on_words.weight: 1.0 -> 2.0), so"
        " --only-failed cannot keep the other rows; `grpo score --iteration 0 --force` reruns it"
    )


def test_a_killed_only_failed_is_finished_as_such(tmp_path: Path) -> None:
    """Stopped after its first shard: the next plain `grpo score` resumes it, and scores nothing else."""
    (tmp_path / "broken").touch()
    run = opened(tmp_path, reward("fails_on_words"), reward("length"), on_error="drop")
    scored(run)
    with run.console.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            only_failed(run)
    calls(tmp_path, "length"), calls(tmp_path, "fails_on_words")
    (tmp_path / "broken").unlink()
    run = opened(tmp_path, reward("fails_on_words"), reward("length"), on_error="drop")
    scored(run)
    assert (calls(tmp_path, "length"), calls(tmp_path, "fails_on_words")) == ([], [])
    only_failed(run)
    assert calls(tmp_path, "fails_on_words") == [1]
    assert values(run, "fails_on_words")[3] == 2.0


def test_only_failed_leaves_a_begun_force_alone(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    run = opened(tmp_path, reward("fails_on_words"), reward("length"), on_error="drop")
    scored(run)
    with run.console.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            scored(run, force=True)
    calls(tmp_path, "length"), calls(tmp_path, "fails_on_words")
    run = opened(tmp_path, reward("fails_on_words"), reward("length"), on_error="drop")
    only_failed(run)
    assert (calls(tmp_path, "length"), calls(tmp_path, "fails_on_words")) == ([], [1])


def test_only_failed_and_force_contradict(project: Path, grpo: Grpo) -> None:
    code, _, err = grpo("score", "--only-failed", "--force")
    assert code == UsageError.exit_code
    assert err == (
        "error: --only-failed and --force cannot be combined: one keeps rows, the other reruns all\n"
    )


# ---- the rest of the pipeline ----


def test_a_run_with_a_judge_is_verified_and_queried(project: Path, grpo: Grpo) -> None:
    (project / "rubric.md").write_text("{prompt} {response}")
    with serve(lambda question, request: says(f"Score: {sum(map(ord, question)) % 7}")) as endpoint:
        keys = f"url: '{endpoint.url}', model: m, rubric: rubric.md, scale: [0, 10]"
        options = ["--set", f"score.rewards=[{{judge: {{{keys}}}, name: taste}}]"]
        code, _, err = grpo("run", *options)
        assert code == 0, err
        assert len(endpoint.asked) == 12
        code, out, err = grpo("status", "--json", *options)
        assert out.count('"done"') == 8, out
        # 3 prompts x 2 samples of an iteration: as many rewards, each with an answer
        code, out, err = grpo("score", "--iteration", "1", "--force", *options)
        assert (code, err.splitlines()[-1]) == (0, "score 1: 6 rows, 6 judgements"), err
        code, out, err = grpo("score", "--iteration", "1", "--force", "--json", *options)
        assert [result["rows"] for result in json.loads(out)] == [6], err
        (project / "rubric.md").write_text("{response} {prompt}")
        code, out, err = grpo("status", *options)
        assert "score.rewards.taste: its file changed" in out, out
    query = (
        "select count(*) as n, bool_and(answer = 'Score: ' || (10 * value)::int) as same"
        " from judgements join rewards using (iteration, group_id, sample_id, name)"
    )
    code, out, err = grpo("sql", query, "--json")
    assert '"n": 12' in out, err
    assert '"same": true' in out
    code, out, err = grpo("verify", "tiny")
    assert "0 damaged, 0 broken, 0 stale" in out, out + err
