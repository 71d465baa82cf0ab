"""A run on chats: its prompts are rendered once and kept, whatever the clock and the environment become."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo

from grpo.pipeline.begin import Look
from grpo.prompts.source import Row

CLOCK = "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[a]"
CHAT = ["--set", "prompts.chat=true", "--set", "score.rewards=[{function: exact_answer}]"]


def shown(grpo: Grpo, run: str = "tiny") -> list[Any]:
    """The texts that the model saw, of each prompt."""
    query = "select prompt_id, list(distinct prompt) as texts from rollouts group by all order by all"
    code, out, err = grpo("sql", "--json", query, "--run", run)
    assert code == 0, err
    return [row["texts"] for row in json.loads(out)]


def test_a_template_is_asked_for_the_time_once_a_run(project: Path, grpo: Grpo) -> None:
    (project / "clock.jinja").write_text(CLOCK)
    settings = [*CHAT, "--set", "prompts.chat_template=clock.jinja"]
    assert grpo("run", "--until", "1", *settings)[0] == 0
    code, _, err = grpo("run", *settings, "--set", "generate.prompts_per_iteration=6")
    assert code == 0, err
    texts = shown(grpo)
    assert [len(each) for each in texts] == [1] * 6  # two iterations, and each prompt has one text
    assert grpo("verify")[0] == 0


@pytest.mark.parametrize(
    "variables",
    [{"TZ": "Asia/Tokyo", "LANG": "tr_TR.UTF-8"}, {"LC_ALL": "C", "PYTHONHASHSEED": "3", "USER": "x"}],
)
def test_the_environment_is_in_no_table(
    project: Path, grpo: Grpo, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grpo("run", *CHAT)[0] == 0
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    time.tzset()
    code, _, err = grpo("run", *CHAT, "--set", "run=other")
    monkeypatch.undo()
    time.tzset()
    assert code == 0, err
    one, two = (
        {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("*.parquet"))}
        for run in (project / "artifacts" / "tiny", project / "artifacts" / "other")
    )
    assert one == two


def test_a_run_of_before_texts_were_kept_goes_on(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_they_are(look: Look, rows: list[Row]) -> list[Row]:
        return rows

    with monkeypatch.context() as before:
        before.setattr(Look, "render", as_they_are)
        assert grpo("run", "--until", "1", *CHAT)[0] == 0
    columns = "select column_name from (describe prompts)"
    names = [row["column_name"] for row in json.loads(grpo("sql", "--json", columns)[1])]
    assert "rendered_prompt" not in names
    code, _, err = grpo("run", *CHAT)
    assert code == 0, err
    assert all(len(each) == 1 and each[0].startswith("user: ") for each in shown(grpo))
    # Lost, they are made again as they were: what was sampled from them still holds.
    shutil.rmtree(project / "artifacts" / "tiny" / "prompts")
    code, _, err = grpo("run", *CHAT, "--set", "iterations=3")
    assert code == 0, err


def test_fields_of_messages_are_in_the_table_and_reach_a_reward(project: Path, grpo: Grpo) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "1+1="}], "answer": "2"},
        {"messages": [{"role": "user", "content": "1+2=", "name": "Ann"}], "answer": "3"},
    ]
    (project / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "reward.py").write_text(
        "def code(prompts, completions, answer):\n"  # no **columns: rendered_prompt is not passed
        "    return [len(p[0]) + len(text[0]['content']) for p, text in zip(prompts, completions)]\n"
    )
    settings = ["--set", "prompts.source=chats.jsonl"]
    code, _, err = grpo("run", *settings)
    assert code == 0, err
    assert "prompts: field name of messages has no effect: the chat template does not show it\n" in err
    query = "select messages, rendered_prompt from prompts order by prompt_id"
    found = json.loads(grpo("sql", "--json", query)[1])
    assert [row["messages"][0]["name"] for row in found] == [None, "Ann"]
    assert [row["rendered_prompt"] for row in found] == [f"user: 1+{n}=\nassistant: " for n in (1, 2)]


def test_doctor_says_what_is_odd(project: Path, grpo: Grpo) -> None:
    row: dict[str, object] = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    }
    row["answer"] = "2"
    (project / "chats.jsonl").write_text((json.dumps(row) + "\n") * 2)
    (project / "own.jinja").write_text("{{ messages[-1].content }}")
    settings = ["--set", "prompts.source=chats.jsonl", "--set", "prompts.chat_template=own.jinja"]
    settings += ["--set", "score.rewards=[{function: exact_answer}]"]
    held_out = ["--set", "evaluate={prompts: {source: prompts.jsonl}}"]
    code, out, _ = grpo("doctor", "--json", *settings, *held_out)
    notes = {check["name"]: check["note"] for check in json.loads(out)["checks"]}
    assert code == 0, out
    assert notes["prompts"] == (
        "2 rows, 1 distinct prompts; the chat template leaves text of system messages out, in 2 of 2 chats;"
        " the chat template gives the same text with and without add_generation_prompt: nothing says that the"
        " assistant is next"
    )
    assert notes["held out"] == (
        "evaluate.prompts: 1 of 6 are among `prompts`: not held out; evaluate.prompts: 6 of 6 are text, and"
        " `prompts` are chats: the model is measured on another form; evaluate.prompts: chat_template is not"
        " that of `prompts`"
    )
