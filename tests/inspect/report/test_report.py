import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread
from tests.conftest import Grpo
from tests.inspect.report.runs import make_run, row

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.inspect import report
from grpo.inspect.report import overview

HOSTILE = "</script><script>window.hacked=1</script>\x1b[31m\u202e<img src=x onerror=window.hacked=1>"


def blocks(page: str) -> dict[str, bytes]:
    """The data blocks of a page, unpacked."""
    found = re.findall(r'<script type="text/plain" id="([a-z0-9-]+)">([^<]*)</script>', page)
    return {name: gzip.decompress(base64.b64decode(text)) for name, text in found}


# The command


def test_the_report_of_a_run_is_a_file_of_its_name(finished: Path, grpo: Grpo) -> None:
    code, out, err = grpo("report")
    assert (code, out) == (0, "")
    assert re.fullmatch(r"report: tiny\.html, \d\.\d MiB\n", err)
    held = blocks(Path("tiny.html").read_text())
    assert list(held) == ["data", "heat-0", "rollouts-0", "plotly"]
    assert len(json.loads(held["rollouts-0"])["rollouts"]) == 12  # 2 iterations x 3 prompts x 2 samples
    [summary] = json.loads(held["data"])["runs"]
    assert (summary["iterations"], summary["rollouts"], summary["config"]["seed"]) == (2, 12, "0")
    assert summary["versions"]["grpo"]


def test_a_run_has_the_same_report_every_time(finished: Path, grpo: Grpo) -> None:
    assert grpo("report")[0] == 0
    first = Path("tiny.html").read_bytes()
    assert json.loads(grpo("report", "--json")[1]) == {
        "file": "tiny.html",
        "bytes": len(first),
        "left_out": [],
    }
    assert Path("tiny.html").read_bytes() == first


def test_several_runs_are_in_one_report(finished: Path, grpo: Grpo) -> None:
    grpo("fork", "tiny", "other", "--iteration", "1", "--set", "update.learning_rate=0.02")
    assert grpo("report", "tiny", "other", "tiny")[0] == 0
    data = json.loads(blocks(Path("report.html").read_text())["data"])
    assert [run["run"] for run in data["runs"]] == ["tiny", "other"]
    rewards = data["charts"][0]["series"]
    assert [(each["run"], each["x"]) for each in rewards] == [("tiny", [0, 1]), ("other", [0, 1])]
    assert [run["config"]["update.learning_rate"] for run in data["runs"]] == ["0.01", "0.02"]
    [seconds] = [chart["series"] for chart in data["charts"] if chart["title"] == "Seconds by stage"]
    assert [(each["run"], each["name"], each["x"]) for each in seconds] == [
        *(("tiny", "", [0, 1]), ("other", "", [0, 1])),
    ]
    status = json.loads(grpo("status", "tiny", "--json")[1])["iterations"]
    assert seconds[0]["y"] == pytest.approx([each["seconds"] for each in status])


def test_what_is_left_out_is_said(finished: Path, grpo: Grpo) -> None:
    code, _, err = grpo("report", "--rollouts", "6")
    assert code == 0
    left = "run tiny: 6 of 12 rollouts are in the file: all of 1 of 2 iterations, evenly spaced"
    assert err.splitlines()[0] == f"report: {left}; --rollouts N changes it, the curves count all"
    assert json.loads(blocks(Path("tiny.html").read_text())["data"])["left_out"] == [left]


def test_the_picture_is_a_png(finished: Path, grpo: Grpo) -> None:
    assert grpo("report", "--png")[0] == 0
    content = Path("tiny.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    # 4 panels of 3.1 x 2.1 inches a row at 130 dots; 11 charts that are not empty: 3 rows.
    assert (width, height) == (1612, 819)
    assert imread("tiny.png")[560:800, 1240:].min() == 1.0  # the twelfth place is white


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.txt"], "--out x.txt: expected a file ending in .html"),
        (["--png", "--out", "x.html"], "--out x.html: expected a file ending in .png"),
        (["--out", "none/x.html"], "--out none/x.html: no folder none"),
        (["--rollouts", "-1"], "--rollouts -1: expected a number of rollouts, 0 or more"),
        (
            ["--png", "--rollouts", "3"],
            "--rollouts: a picture shows curves only; leave it out, or leave out --png",
        ),
        (["nope"], "artifacts/nope: no such run; runs there: tiny"),
    ],
)
def test_a_mistake_is_one_line(finished: Path, grpo: Grpo, arguments: list[str], message: str) -> None:
    assert grpo("report", *arguments) == (2, "", f"error: {message}\n")


def test_a_run_without_rollouts_has_no_report(finished: Path, grpo: Grpo) -> None:
    for path in Path("artifacts/tiny").glob("iteration=*"):
        path.rename(f"{path}.away")
    assert grpo("report") == (2, "", "error: run tiny: holds no rollouts yet\n")


# The file


def test_the_page_loads_nothing_and_runs_its_own_scripts_only(finished: Path, grpo: Grpo) -> None:
    grpo("report")
    page = Path("tiny.html").read_text()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [hashlib.sha256(text).digest() for text in (script.encode(), blocks(page)["plotly"])]
    for digest in digests:
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert re.findall(r'\b(?:src|href)="(?!#|data:,)', page) == []
    assert "MIT license" in page  # of the plotting library, which is in the page


def test_what_a_model_wrote_never_stands_in_the_page_as_itself(tmp_path: Path) -> None:
    rewards = {HOSTILE: 1.0}
    run = make_run(
        tmp_path, [row(0, 0, n, HOSTILE, prompt=HOSTILE, rewards=rewards, error=HOSTILE) for n in range(2)]
    )
    page = report.build([run], None)[0].decode()
    assert "hacked" not in page
    held = blocks(page)
    assert len(held) == 4
    found = json.loads(held["rollouts-0"])
    assert found["prompts"] == {"0": {"prompt": HOSTILE, "answer": None}}
    assert "".join(found["texts"][place] for place in found["tokens"][0]) == HOSTILE + "<|endoftext|>"


def test_the_map_has_a_cell_for_each_prompt_and_iteration(hand: ActiveRun) -> None:
    found = sql.snapshot([hand], lambda connection: overview.heat(connection, hand))
    assert (found["reward"], found["binary"], found["prompt_ids"]) == ("right", True, [0, 1, 2])
    columns = found["columns"]
    cells = zip(*(columns[name] for name in ("prompt", "iteration", "mean", "rollouts")), strict=True)
    # prompt 0 had 1 and 0, then 1 and 1; prompt 1 had 0 and 0; prompt 2, of iteration 1 only, 1 and 0
    assert list(cells) == [(0, 0, 0.5, 2), (0, 1, 1.0, 2), (1, 0, 0.0, 2), (2, 1, 0.5, 2)]


def test_what_changed_on_the_way_is_listed(finished: Path, grpo: Grpo) -> None:
    grpo("run", "--set", "iterations=3", "--set", "update.learning_rate=0.5")
    assert grpo("report")[0] == 0
    [summary] = json.loads(blocks(Path("tiny.html").read_text())["data"])["runs"]
    assert summary["changes"] == ["iteration 2: update.learning_rate: 0.01 -> 0.5"]
