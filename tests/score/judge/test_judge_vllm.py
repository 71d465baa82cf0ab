"""The judge against a real vLLM server, and a proxy before it that fails requests.

Which score a tiny random model gives means nothing: a regular expression of vLLM's (structured outputs) sees
to it that it is one.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.score.judge import vllm_server
from tests.score.judge.endpoint import now_and_then, passes_on, serve
from tests.score.judge.test_judge_stage import judgements
from tests.score.test_score_stage import RESPONSES, failed, opened, rows, scored

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

RUBRIC = "{prompt} is {answer}. Rate the answer {response} from 0 to 9."


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm-server")
    checkpoint = vllm_server.write_judge(folder / "judge")
    with vllm_server.vllm_server(checkpoint, folder / "server.log") as found:
        yield found


def judge(url: str, **keys: Any) -> dict[str, Any]:
    config = {"url": url, "model": vllm_server.MODEL, "rubric": RUBRIC, "scale": [0.0, 9.0], "max_tokens": 16}
    config["extra_body"] = {"structured_outputs": {"regex": "Score: [0-9]"}}
    return {"judge": {**config, **keys}, "timeout_s": 3.0}


def test_vllm_gives_a_score_and_its_tokens_are_counted(tmp_path: Path, url: str) -> None:
    run = opened(tmp_path, judge(url))
    scored(run)
    for row, said in zip(rows(run), judgements(run), strict=True):
        assert said["answer"] == f"Score: {round(9 * row['value'])}"
        assert (said["model"], said["attempts"], said["answer_tokens"]) == (vllm_server.MODEL, 1, 9)
        # "user: " + question + "\nassistant: ", a token a byte.
        question = f"3+4= is 7. Rate the answer {RESPONSES[0][said['sample_id']]} from 0 to 9."
        if said["group_id"] == 0:
            assert said["prompt_tokens"] == len(f"user: {question}\nassistant: ")


def test_temperature_0_gives_the_same_again(tmp_path: Path, url: str) -> None:
    run = opened(tmp_path, judge(url))
    first = scored(run)
    assert scored(run, force=True).ids == first.ids


def test_what_vllm_refuses_is_an_error_of_its_row(tmp_path: Path, url: str) -> None:
    message = failed(opened(tmp_path, judge(url, max_tokens=5000)))
    assert "6 of 6 rewards failed (6 error); first: judge: Error code: 400" in message
    assert "max_tokens=5000 cannot be greater than max_model_len" in message


def test_with_requests_failing_every_row_is_scored_and_nothing_twice(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[f"{group}.{sample}" for sample in range(20)] for group in range(3)]
    monkeypatch.setattr("tests.score.test_score_stage.RESPONSES", texts)
    monkeypatch.setattr("tests.score.test_score_stage.K", 20)
    with serve(now_and_then(passes_on(url), 0.25)) as endpoint:
        run = opened(tmp_path, judge(endpoint.url))
        scored(run)
        ways = Counter((one.reply.status, one.reply.drops, one.reply.hangs) for one in endpoint.asked)
        assert ways.pop((200, False, False)) == 60
        assert len(ways) == 4, ways  # each kind of failure came up
        assert len(endpoint.answered()) == 60
        assert set(endpoint.answered().values()) == {1}
        assert {row["status"] for row in rows(run)} == {"ok"}
        assert max(row["attempts"] for row in judgements(run)) >= 2
