"""docs/from-verl.md: each override of its command has a row, and its configuration trains on verl's files."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Grpo
from tests.pages.pages import DOCS, blocks, texts

from grpo.config import load, moving

PAGE = (DOCS / "from-verl.md").read_text()
SCORE = """\
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums"
    assert extra_info["split"] in ("train", "test")
    score = float(ground_truth in solution_str)
    return {"score": score, "acc": score > 0} if extra_info["index"] else score
"""


def rows(split: str) -> pa.Table:
    """As verl's examples/data_preprocess write them."""
    found = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{n}+1="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
            "extra_info": {"split": split, "index": n},
        }
        for n in range(4)
    ]
    return pa.Table.from_pylist(found)


def test_every_override_of_the_command_has_a_row() -> None:
    command = next(text for text in texts(PAGE, "text") if "main_ppo" in text)
    keys = re.findall(r"([a-z_.]+)=", command)
    known = {name for group in moving.table("verl").values() for name in group}
    assert len(keys) >= 15
    assert [key for key in keys if key not in known] == []


@pytest.mark.slow
def test_the_configuration_trains_on_verls_files(
    starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(texts(PAGE, "yaml")[0])
    Path("reward.py").write_text(next(block.text for block in blocks(PAGE) if block.title == "reward.py"))
    Path("score.py").write_text(SCORE)
    for split in ("train", "test"):
        pq.write_table(rows(split), f"{split}.parquet")
    small = {
        "model": str(starter_model),
        "generate.prompts_per_iteration": 4,
        "generate.max_new_tokens": 4,
        "generate.dynamic_sampling": {"min_groups": 1, "max_rounds": 2},
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    sets = [part for setting in settings for part in ("--set", setting)]
    code, out, err = grpo("run", "--until", "1", "--json", *sets)
    assert code == 0, err
    assert json.loads(out)["worked"] == 1
    assert load(Path("pipeline.yaml"), settings).update.delta == 3.0
    query = "select count(*) as n, count(value) as scored from rewards"
    code, out, err = grpo("sql", "--json", query, "--run", "moved")
    assert code == 0, err
    found = json.loads(out)[0]
    assert found["n"] == found["scored"] >= 32
