"""docs/steering.md: its commands run on the quickstart, and do what it says."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.pages.pages import DOCS, ROOT, commands, texts

PAGE = (DOCS / "steering.md").read_text()


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pipeline.yaml", tmp_path)
    shutil.copytree(starter_model, tmp_path / "artifacts" / ".models" / "tiny-arithmetic")
    [query] = texts(PAGE, "sql")
    (tmp_path / "next.sql").write_text(query)
    answers = []
    for command in commands(PAGE):
        code, out, err = grpo(*shlex.split(command)[1:], "--json")
        assert code == 0, (command, err)
        answers.append(json.loads(out))
    assert [answer["worked"] for answer in answers[::2]] == [4, 2, 4]
    curriculum, rounds, replay = answers[1::2]
    assert [row["iteration"] for row in curriculum] == [0, 1, 2, 3]
    # Of 32 groups not all have signal, so that 36 take more than one round of them.
    assert {row["iteration"]: row["round"] for row in rounds} in ({0: 1, 1: 1}, {0: 1, 1: 2}, {0: 2, 1: 2})
    assert {row["groups"] for row in rounds} == {32}
    pairs = [(row["update_iteration"], row["iteration"]) for row in replay]
    assert pairs == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]


def test_the_curriculum_draws_what_teaches(project: Path, grpo: Grpo) -> None:
    """Of 24 prompts 16 are drawn in iteration 0: those below 4 have signal, all others are always wrong."""
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(24)]
    (project / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "reward.py").write_text(
        "def code(prompts, completions, **columns):\n"
        "    n = int(prompts[0].partition('+')[0])\n"
        "    return [float(n < 4 and sample % 2 == 0) for sample in range(len(prompts))]\n"
    )
    (project / "first.sql").write_text("select unnest(range(16)) as prompt_id")
    (project / "next.sql").write_text((ROOT / "examples" / "curriculum.sql").read_text())
    keys = ("--set", "generate.samples_per_prompt=8", "--set", "update.learning_rate=0.0")
    first = ("--set", "generate.prompts_per_iteration=16", "--set", "generate.prompts_sql=first.sql")
    then = ("--set", "generate.prompts_per_iteration=6", "--set", "generate.prompts_sql=next.sql")
    assert grpo("run", "--until", "1", *keys, *first)[0] == 0
    code, _, err = grpo("run", "--until", "9", *keys, *then)
    assert code == 0, err
    query = (
        "select prompt_id, count(*) as drawn from samples where iteration > 0 and sample_id = 0 group by 1"
    )
    drawn = {row["prompt_id"]: row["drawn"] for row in json.loads(grpo("sql", query, "--json")[1])}
    # p (1 - p): 0.25 for the first four and for those never drawn, (0.5 / 9) (8.5 / 9) = 0.05 for the others,
    # whose squares are to each other as 23 to 1. Each of the last eight is drawn, then is as the others.
    assert sum(drawn.get(n, 0) for n in range(4)) >= 24  # of 32; by uniform chance it would be 8
    assert min(drawn.get(n, 0) for n in range(16, 24)) >= 1
