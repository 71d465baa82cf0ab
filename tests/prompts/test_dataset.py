"""Data sets of the library `datasets`: its own saved folders and loading code, no network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo

from grpo.config import PromptsConfig
from grpo.errors import DataError, UsageError
from grpo.prompts.source import read_rows, source_digest

datasets = pytest.importorskip("datasets")
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n} for n in range(6)]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What load_dataset makes of a folder goes below the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save(folder: Path, rows: list[dict[str, Any]] = ROWS, fingerprint: str | None = None) -> None:
    data = datasets.Dataset.from_list(rows)
    datasets.Dataset(data.data, data.info, fingerprint=fingerprint or data._fingerprint).save_to_disk(folder)


def save_splits(folder: Path, **splits: list[dict[str, Any]]) -> None:
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(folder)


def rows_of(folder: Path, **config: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(PromptsConfig(source="data", **config), folder)]


def refused(folder: Path, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(PromptsConfig(**{"source": "data", **config}), folder))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


# ---- what is read ----


def test_a_saved_data_set(tmp_path: Path) -> None:
    save(tmp_path / "data")
    found = list(read_rows(PromptsConfig(source="data"), tmp_path))
    assert [row for _, row in found] == ROWS
    assert [place for place, _ in found][:2] == ["data (train): row 1", "data (train): row 2"]


def test_a_saved_data_set_that_was_sorted_and_filtered_is_read_in_its_new_order(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS).select([4, 1, 3])
    data.save_to_disk(tmp_path / "data")
    assert rows_of(tmp_path) == [ROWS[4], ROWS[1], ROWS[3]]


def test_saved_splits(tmp_path: Path) -> None:
    save_splits(tmp_path / "data", train=ROWS[:2], test=ROWS[2:])
    assert rows_of(tmp_path) == ROWS[:2]
    assert rows_of(tmp_path, split="test") == ROWS[2:]


def test_a_folder_of_files_with_splits_and_subsets(tmp_path: Path) -> None:
    (tmp_path / "data" / "hard").mkdir(parents=True)
    table = datasets.Dataset.from_list(ROWS).data.table
    pq.write_table(table.slice(0, 4), tmp_path / "data" / "train-00000.parquet")
    pq.write_table(table.slice(4), tmp_path / "data" / "test-00000.parquet")
    pq.write_table(table.slice(5), tmp_path / "data" / "hard" / "train.parquet")
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- {config_name: easy, default: true, data_files: [{split: train, path: train-*},"
        " {split: test, path: test-*}]}\n- {config_name: hard, data_files: hard/*.parquet}\n---\n"
    )
    assert rows_of(tmp_path) == ROWS[:4]
    assert rows_of(tmp_path, split="test") == ROWS[4:]
    assert rows_of(tmp_path, subset="hard") == ROWS[5:]
    assert refused(tmp_path, split="dev").startswith(
        'prompts.source: data: cannot be loaded: Unknown split "dev"'
    )
    text = refused(tmp_path, subset="none")
    assert text.startswith(
        "prompts.source: data (subset none): cannot be loaded: BuilderConfig 'none' not found"
    )
    assert "easy" in text


def test_a_folder_of_arrow_files(tmp_path: Path) -> None:
    save(tmp_path / "saved")
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "data" / "train.arrow")
    assert rows_of(tmp_path) == ROWS


# ---- what is refused ----


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_splits(tmp_path / "data", train=ROWS[:2], test=ROWS[2:])
    there = "there are train, test (prompts.split)"
    assert (
        refused(tmp_path, split="dev") == f"prompts.source: data: cannot be loaded: has no split dev; {there}"
    )
    save(tmp_path / "one")
    text = refused(tmp_path, source="one", split="test")
    way = "holds one table, not a split test; leave prompts.split out"
    assert text == f"prompts.source: one: cannot be loaded: {way}"
    text = refused(tmp_path, source="one", subset="main")
    way = "a saved data set has no subsets; leave prompts.subset out"
    assert text == f"prompts.source: one (subset main): cannot be loaded: {way}"


@pytest.mark.parametrize("nested", [False, True])
def test_images_are_refused_with_their_column(tmp_path: Path, nested: bool) -> None:
    image = {"bytes": b"\x89PNG", "path": None}
    feature = datasets.List(datasets.Image()) if nested else datasets.Image()
    features = datasets.Features({"prompt": datasets.Value("string"), "image": feature})
    data = datasets.Dataset.from_dict({"prompt": ["a"], "image": [[image] if nested else image]}, features)
    data.save_to_disk(tmp_path / "data")
    holds = "holds images or other media (a struct of bytes and path), and prompts are text only"
    way = "leave the column out (in `datasets`: remove_columns)"
    assert refused(tmp_path) == f"prompts.source: data: column image {holds}; {way}"
    pq.write_table(data.data.table, tmp_path / "p.parquet")
    assert refused(tmp_path, source="p.parquet") == f"p.parquet: column image {holds}; {way}"


def test_a_struct_of_bytes_and_path_that_holds_text_is_no_image(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "file": {"bytes": "12", "path": "a.txt"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert [row for _, row in read_rows(PromptsConfig(source="p.parquet"), tmp_path)] == rows


def test_a_column_that_is_decoded_only_when_it_is_used_is_refused(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "info": datasets.Json()})
    data = datasets.Dataset.from_dict({"prompt": ["a"], "info": [{"n": 1}]}, features)
    data.save_to_disk(tmp_path / "data")
    holds = "is of the type Json; save it as text or as a struct"
    assert refused(tmp_path) == f"prompts.source: data: column info {holds}"


def test_a_folder_without_data_and_a_name_that_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert refused(tmp_path).startswith("prompts.source: data: cannot be loaded: ")
    expected = "expected `arithmetic`, a file ending in .jsonl, .csv or .parquet, a folder with a data set"
    assert refused(tmp_path, source="squad") == (
        f"prompts.source: squad: no such file or folder; {expected}, or owner/name of one on the hub"
    )


def test_a_folder_here_but_not_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library would take it, though paths are relative to the configuration.
    save(tmp_path / "my" / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    with pytest.raises(DataError) as caught:
        list(read_rows(PromptsConfig(source="my/data"), tmp_path / "configs"))
    assert str(caught.value) == (
        "prompts.source: my/data: is here, but not beside the configuration; give its path from"
        f" {tmp_path}/configs"
    )


# ---- what it is known by ----


def test_the_digest_is_of_the_rows_and_not_of_when_they_were_saved(tmp_path: Path) -> None:
    def digest(name: str, **config: Any) -> str | None:
        return source_digest(PromptsConfig(source=name, **config), tmp_path)

    save(tmp_path / "one", fingerprint="a" * 16)
    save(tmp_path / "same", fingerprint="b" * 16)
    assert (tmp_path / "one" / "state.json").read_text() != (tmp_path / "same" / "state.json").read_text()
    os.utime(tmp_path / "same" / "data-00000-of-00001.arrow", (0, 0))
    save(tmp_path / "other", ROWS[:5])
    assert digest("one") == digest("same") != digest("other")
    save_splits(tmp_path / "split", train=ROWS, test=ROWS[:5])
    assert digest("split") == digest("one")  # only the split that is read
    assert digest("split", split="test") == digest("other")


def test_the_digest_of_a_folder_is_of_all_it_holds_but_hidden_files(tmp_path: Path) -> None:
    config = PromptsConfig(source="data")
    (tmp_path / "data" / ".git").mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(ROWS[0]))
    first = source_digest(config, tmp_path)
    (tmp_path / "data" / ".git" / "index").write_text("x")
    assert source_digest(config, tmp_path) == first
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "data" / "test.jsonl")
    assert source_digest(config, tmp_path) != first


def test_a_data_set_on_the_hub_has_none() -> None:
    assert source_digest(PromptsConfig(source="owner/name"), Path("/nowhere")) is None


# ---- runs ----


def test_a_run_on_a_saved_data_set_of_chats_goes_on_when_it_is_gone(project: Path, grpo: Grpo) -> None:
    save(project / "mine" / "chats", CHATS)  # a path that looks like a hub id
    settings = ["--set", "prompts.source=mine/chats", "--set", "score.rewards=[{function: exact_answer}]"]
    code, _, err = grpo("run", "--until", "1", *settings)
    assert code == 0, err
    code, out, _ = grpo(
        "sql", "--json", "select prompt, messages, answer from prompts order by prompt_id limit 1"
    )
    assert json.loads(out) == [{"prompt": None, "messages": CHATS[0]["prompt"], "answer": "1"}]
    code, out, _ = grpo("sql", "--json", "select distinct prompt[:6] as start from rollouts")
    assert json.loads(out) == [{"start": "user: "}]  # through the chat template

    shutil.rmtree(project / "mine" / "chats")
    save(project / "moved", CHATS)
    assert grpo("run", "--until", "1", "--set", "prompts.source=moved", *settings[2:])[0] == 0
    code, _, err = grpo("run", *settings)
    assert code == 0, err
    assert "prompts.source: mine/chats is gone; the run has its own copy" in err
    # Other rows, or what is on the hub under a name that was not the run's, are another data set.
    save(project / "moved", CHATS[:5])
    code, _, err = grpo("run", "--set", "prompts.source=moved", *settings[2:])
    assert (code, "prompts.source: its file changed" in err) == (4, True), err
    code, _, err = grpo("run", "--set", "prompts.source=other/chats", *settings[2:])
    assert (code, "prompts.source: added" in err) == (4, True), err


@pytest.mark.parametrize("command", [("run",), ("doctor",)])
def test_without_the_library_the_command_that_installs_it_is_named(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    save(project / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, out, err = grpo(*command, "--set", "prompts.source=data")
    needs = "prompts.source: data: needs the library `datasets`; pip install 'grpo-stages[data]'"
    assert (code, needs in (out + err).replace("\n", " ")) == (2, True), out + err
    assert not list(project.glob("artifacts/tiny/prompts"))


def test_doctor_reads_a_data_set_and_downloads_none(
    project: Path, grpo: Callable[..., tuple[int, str, str]]
) -> None:
    save(project / "data")

    def prompts_check(*options: str) -> dict[str, Any]:
        checks = json.loads(grpo("doctor", "--json", *options)[1])["checks"]
        return next(check for check in checks if check["name"] == "prompts")

    assert prompts_check("--set", "prompts.source=data")["found"] == "data: 6 rows, the longest 4 tokens"
    check = prompts_check("--set", "prompts.source=owner/name")
    assert (check["level"], check["found"]) == ("warning", "owner/name")
    assert check["note"] == "owner/name is downloaded at the first run; --model downloads it now"


def test_the_hub_out_of_reach_is_one_line(project: Path) -> None:
    code = (
        "import sys; from grpo.cli import main; "
        "sys.argv = ['grpo', 'run', '--set', 'prompts.source=owner/name']; main()"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(project / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 3, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: prompts.source: owner/name: cannot be loaded: "), line
    assert "Traceback" not in done.stderr


def test_a_revision_is_what_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **given: Any) -> Any:
        asked.append((names, given))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for revision in (None, "v1"):
        config = PromptsConfig(source="owner/name", revision=revision)
        assert [row for _, row in read_rows(config, tmp_path)] == [{"prompt": "a"}]
    names = ("owner/name", None)
    assert asked == [(names, {"split": "train", "revision": each}) for each in (None, "v1")]


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    save(tmp_path / "mine", [{"prompt": "a"}])
    with pytest.raises(UsageError) as caught:
        list(read_rows(PromptsConfig(source="mine", revision="v1"), tmp_path))
    text = "prompts.revision: mine is a folder; only a data set on the hub has revisions"
    assert str(caught.value) == text
