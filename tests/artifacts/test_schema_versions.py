"""Runs of this schema stay readable; what an older or a newer one made is refused by name.

data/schema-N holds a small run as the last release with SCHEMA_VERSION N wrote it, without its checkpoint.
Never make one again: a new schema gets a new folder. Schema 1 had other keys in its manifests; in 2 the
weights of a policy were files of its update.
"""

import json
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo

from grpo import tables
from grpo.artifacts.manifest import SCHEMA_VERSION, seal

DATA = Path(__file__).parents[1] / "data"
RUN = Path("artifacts/tiny")
VIEWS = (*tables.TABLES, "samples", "iterations", "eval_samples", "evals", "timings", "manifests")


@pytest.fixture(params=range(3, SCHEMA_VERSION + 1))
def old_run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that a schema version has left; the test runs beside it."""
    shutil.copytree(DATA / f"schema-{request.param}", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RUN


def test_a_run_of_every_released_version_is_whole_and_readable(old_run: Path, grpo: Grpo) -> None:
    code, out, err = grpo("verify", "tiny", "--json")
    found = json.loads(out)
    assert (code, found["damaged"], found["broken"]) == (0, [], {}), err
    counts = {}
    for view in VIEWS:
        code, out, err = grpo("sql", f"select count(*) as rows from {view}", "--run", "tiny", "--json")
        assert code == 0, err
        counts[view] = json.loads(out)[0]["rows"]
    assert counts["rollouts"] == counts["rewards"] == counts["advantages"] == counts["samples"] == 4
    # Tables that came later, without a new schema.
    later = [view for view in counts if view.startswith("eval") or view in ("judgements", "teacher_logprobs")]
    assert [counts.pop(view) for view in later] == [0] * 8
    assert min(counts.values()) > 0
    for command in ("status", "show"):
        code, _, err = grpo(command, "tiny")
        assert code == 0, err


@pytest.mark.parametrize("version", range(1, 3))
def test_an_older_version_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, version: int
) -> None:
    shutil.copytree(DATA / f"schema-{version}", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    code, _, err = grpo("status", "tiny")
    assert code == 4
    assert f"written by an older grpo (schema {version}, this one reads {SCHEMA_VERSION})" in err
    assert len(err.splitlines()) == 1


def test_a_newer_version_is_refused_by_name(old_run: Path, grpo: Grpo) -> None:
    path = old_run / "iteration=000000/rewards/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_bytes(seal({**manifest, "schema_version": 99}))
    code, _, err = grpo("sql", "select count(*) from rewards", "--run", "tiny")
    newer = f"written by a newer grpo (schema 99, this one reads up to {SCHEMA_VERSION})"
    assert (code, err) == (4, f"error: {path}: {newer}\n")
