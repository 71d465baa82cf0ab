"""docs/steering.md: its commands run on the quickstart, and do what it says."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.pages import DOCS, ROOT, commands, texts

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


def test_the_curriculum_takes_three_prompts_that_teach_for_one_that_explores(
    project: Path, grpo: Grpo
) -> None:
    """Of 24 prompts the first six are drawn in iteration 0: 2 to 5 have signal, 0 and 1 have none."""
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(24)]
    (project / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "reward.py").write_text(
        "def code(prompts, completions, **columns):\n"
        "    n = int(prompts[0].partition('+')[0])\n"
        "    return [float(n == 0 or (n > 1 and sample == 0)) for sample in range(len(prompts))]\n"
    )
    text = (ROOT / "examples" / "curriculum.sql").read_text()
    first = "select unnest([0, 1, 2, 3, 4, 5]) as prompt_id"
    (project / "first.sql").write_text(first)
    (project / "next.sql").write_text(text)
    sizes = ("--set", "generate.prompts_per_iteration=6", "--set", "update.learning_rate=0.0")
    assert grpo("run", "--until", "1", *sizes, "--set", "generate.prompts_sql=first.sql")[0] == 0
    code, _, err = grpo("run", "--until", "2", *sizes, "--set", "generate.prompts_sql=next.sql")
    assert code == 0, err
    query = "select distinct group_id, prompt_id as id from rollouts where iteration = 1 order by all"
    drawn = [row["id"] for row in json.loads(grpo("sql", query, "--json")[1])]
    # Turns of those that teach: 1/3, 2/3, 1, 4/3; of the others: 1, 2, ..., those never drawn first. Two of
    # equal turn stand by their number, and what teaches here has the lower one.
    assert sorted([*drawn[:3], drawn[4]]) == [2, 3, 4, 5]
    assert all(prompt >= 6 for prompt in (drawn[3], drawn[5]))
