"""The project that `grpo init` writes: it is run, and its own test is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Grpo

from grpo.artifacts import files
from grpo.config import load
from grpo.errors import ResourceError
from grpo.manage.init import FILES, create
from grpo.prompts.arithmetic import held_out_rows


def test_a_new_project_runs_at_once_and_learns(
    starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = grpo("init", "my project")
    assert (code, out) == (0, "")
    assert err.endswith("; next: cd 'my project' && grpo run\n")
    folder = tmp_path / "my project"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    shutil.copytree(starter_model, folder / "artifacts" / ".models" / "tiny-arithmetic")
    monkeypatch.chdir(folder)
    assert grpo("run", "--until", "8")[0] == 0
    code, out, _ = grpo(
        "sql", "--json", "select iteration, avg(reward) as r from samples group by all order by 1"
    )
    rewards = [row["r"] for row in json.loads(out)]
    assert 0.2 < rewards[0] < 0.4  # as the starter is made
    assert rewards[7] > 0.7


def test_the_test_of_a_new_project_passes_and_can_fail(tmp_path: Path) -> None:
    create(tmp_path / "p")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path / "p", capture_output=True, text=True, check=False)
    assert (done.returncode, "2 passed" in done.stdout) == (0, True), done.stdout
    reward = tmp_path / "p" / "reward.py"
    reward.write_text(reward.read_text().replace("== right", "!= right"))
    done = subprocess.run(command, cwd=tmp_path / "p", capture_output=True, text=True, check=False)
    assert "2 failed" in done.stdout


def test_the_prompts_are_what_the_starter_can_and_leave_the_held_out_sums(tmp_path: Path) -> None:
    create(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    assert all(eval_sum(row["prompt"]) == int(row["answer"]) for row in rows)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out_rows()}


def eval_sum(prompt: str) -> int:
    left, right = prompt.removesuffix("=").split("+")
    return int(left) + int(right)


def test_the_three_lines_to_change_are_marked(tmp_path: Path) -> None:
    create(tmp_path)
    lines = (tmp_path / "pipeline.yaml").read_text().splitlines()
    keys = []
    for mark in ("[1]", "[2]", "[3]"):
        [place] = [n for n, line in enumerate(lines) if line.strip().startswith(f"# {mark}")]
        keys.append(lines[place + 1].split("#")[0].strip())
    assert keys == ["model: tiny-arithmetic", "source: prompts.jsonl", '- {function: "reward:correct"}']
    config = load(tmp_path / "pipeline.yaml")
    assert (config.run, config.iterations) == ("first", 20)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_has_one_of_the_files_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine")
    code, _, err = grpo("init")
    assert (code, err) == (2, f"error: {name}: is there already; name another folder for the new project\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_file_in_the_place_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_text("")
    code, _, err = grpo("init", "p")
    assert (code, err) == (2, "error: p: is a file; name a folder for the new project\n")


@pytest.mark.parametrize("is_new", [True, False])
def test_nothing_is_left_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool) -> None:
    folder = tmp_path / "p"
    if not is_new:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    write = files.write_file
    written: list[str] = []

    def full(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise ResourceError(f"{path}: No space left on device")
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(ResourceError):
        create(folder)
    assert written == ["prompts.jsonl", "reward.py"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ([] if is_new else ["notes.txt"])
    assert folder.exists() != is_new


def test_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = grpo("init", "--json", "a/b")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"folder": "a/b", "files": list(FILES)}
