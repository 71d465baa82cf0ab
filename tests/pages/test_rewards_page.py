"""docs/rewards.md: each configuration in it scores a finished run, with the files that it shows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import PIPELINE, Grpo
from tests.pages.pages import DOCS, texts
from tests.score.judge.endpoint import says, serve
from tests.score.test_score_stage import write_classifier

from grpo.config.yaml import dump, parse

PAGE = (DOCS / "rewards.md").read_text()


def test_the_page_has_what_is_tried_here() -> None:
    assert [len(texts(PAGE, language)) for language in ("yaml", "python", "markdown", "sql")] == [6, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_an_example_scores(finished: Path, grpo: Grpo, number: int) -> None:
    for source in texts(PAGE, "python"):
        Path(source.splitlines()[0].removeprefix("# ")).write_text(source)
    Path("rubric.md").write_text(texts(PAGE, "markdown")[0])
    write_classifier(finished / "reward-model")
    shown: dict[str, Any] = parse(texts(PAGE, "yaml")[number])
    config = parse(PIPELINE) | shown
    with serve(
        lambda question, request: says("INCORRECT" if "CORRECT" in question else "Score: 4")
    ) as endpoint:
        for reward in shown["score"]["rewards"]:
            if "judge" in reward:
                reward["judge"]["url"] = endpoint.url
        Path("pipeline.yaml").write_text(dump(config))
        if "prompts" in shown:  # fixed for a run: begin anew
            shutil.rmtree("artifacts")
            code, _, err = grpo("generate")
            assert code == 0, err
        code, _, err = grpo("score", "--iteration", "0", "--force")
        assert code == 0, err
    code, out, err = grpo("sql", "select distinct name, status from rewards where iteration = 0", "--json")
    names = [reward.get("name") or name_of(reward) for reward in shown["score"]["rewards"]]
    assert sorted(row["name"] for row in json.loads(out)) == sorted(names), err
    assert {row["status"] for row in json.loads(out)} == {"ok"}
    if names == ["taste"]:
        code, out, err = grpo("sql", texts(PAGE, "sql")[0], "--json")
        assert {(row["value"], row["answer"]) for row in json.loads(out)} == {(0.4, "Score: 4")}, err


def name_of(reward: dict[str, Any]) -> str:
    if "judge" in reward:
        return "judge"
    return str(reward.get("function", reward.get("model"))).rpartition(":")[2].rpartition("/")[2]
