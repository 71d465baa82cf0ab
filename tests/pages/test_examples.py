"""Each configuration of examples/ is one; those on the starter model run as their heads say, an iteration."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.pages.pages import links

from grpo.config import load
from grpo.models.find import BUILT_IN

EXAMPLES = Path(__file__).parents[2] / "examples"
# Those of cluster/ are for Kubernetes (test_cluster.py).
CONFIGURATIONS = sorted(set(EXAMPLES.rglob("*.yaml")) - set(EXAMPLES.glob("cluster/*")))
ON_THE_STARTER = [path.stem for path in CONFIGURATIONS if load(path).model in BUILT_IN]


@pytest.fixture
def folder(tmp_path: Path, starter_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder above examples/, with both starter models; the teacher is as large as the policy."""
    for name in BUILT_IN:
        shutil.copytree(starter_model, tmp_path / "artifacts" / ".models" / name)
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_it_is_a_configuration(path: Path) -> None:
    assert load(path).run


def test_the_readme_has_every_file() -> None:
    named = {link.partition("#")[0] for link in links((EXAMPLES / "README.md").read_text())}
    files = [*CONFIGURATIONS, *EXAMPLES.glob("*.sql"), *EXAMPLES.glob("*.ipynb")]
    assert {str(path.relative_to(EXAMPLES)) for path in files} <= named
    assert [name for name in named if not (EXAMPLES / name).exists()] == []
    assert {"distil", "gdpo", "pass_at_k", "scalerl"} <= set(ON_THE_STARTER)


@pytest.mark.parametrize("name", ON_THE_STARTER)
def test_an_iteration_as_the_head_says(name: str, folder: Path, grpo: Grpo) -> None:
    """From the folder above, where a path relative to the configuration is another than one to here."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    first, *others = [shlex.split(line) for line in re.findall(r"^#   grpo (.*)$", text, re.MULTILINE)]
    assert first == ["run", "-c", f"examples/{name}.yaml"]
    code, _, err = grpo(*first, "--until", "1")
    assert code == 0, err
    assert "pass@1" in err
    for command in others:
        code, out, err = grpo(*command)
        assert code == 0, err
        assert out


def test_tokens_of_a_configuration_elsewhere(folder: Path, grpo: Grpo) -> None:
    """Before the first update the starter's own tokenizer is read, which is beside the runs."""
    configuration = ("-c", "examples/gdpo.yaml")
    code, _, err = grpo("generate", *configuration)
    assert code == 0, err
    code, out, err = grpo("show", *configuration, "--tokens")
    assert code == 0, err
    assert "=" in out


def test_capitals_holds_out_what_it_asks() -> None:
    train, held_out = (
        [json.loads(line) for line in (EXAMPLES / "capitals" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (60, 20)
    assert len({row["prompt"] for row in [*train, *held_out]}) == 80


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("The capital of Brazil is Brasilia.", "Brasília", 1.0),
        ("BRASÍLIA", "Brasília", 1.0),
        ("It is Rio de Janeiro.", "Brasília", 0.0),
        ("The capital is N'Djamena", "N'Djamena", 1.0),
        ("", "Oslo", 0.0),
    ],
)
def test_the_reward_of_capitals(response: str, answer: str, reward: float) -> None:
    names_city = runpy.run_path(str(EXAMPLES / "capitals" / "reward.py"))["names_city"]
    assert names_city(completions=[[{"role": "assistant", "content": response}]], answer=[answer]) == [reward]
