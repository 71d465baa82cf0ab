"""A package that is asked for and not installed: exit 2 and how to install it, wherever it is found out."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from tests.conftest import Grpo

import grpo as door
from grpo.generate.engines import vllm_settings

JUDGE = "{judge: {url: 'http://127.0.0.1:1/v1', model: m, rubric: rubric.txt}}"
ASKED: dict[str, str] = {
    "vllm": "generate.engine=vllm",
    "peft": "update.lora={rank: 2, alpha: 4}",
    "bitsandbytes": "update.optimizer=adamw_8bit",
    "datasets": "prompts.source=folder",
    "openai": f"score.rewards=[{JUDGE}]",
    "obstore": "artifacts.mirror=s3://bucket/runs",
    "trackio": "track=trackio",
    "wandb": "track=wandb",
}


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["doctor"]], ids=" ".join)
@pytest.mark.parametrize("package", ASKED)
def test_a_missing_package_is_exit_2(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, package: str, command: list[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    Path("folder").mkdir()
    Path("rubric.txt").write_text("Rate {prompt} {response} {answer}")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(vllm_settings, "version", missing)
    code, out, err = grpo(*command, "--set", ASKED[package])
    assert (code, "pip install" in out + err) == (2, True), out + err
    assert not list(Path().glob("artifacts/tiny/iteration=*"))


@pytest.mark.parametrize(
    ("package", "ask"),
    [("pandas", lambda run: run.iterations.df()), ("polars", lambda run: run.iterations.pl())],
)
def test_a_missing_package_of_the_caller(
    finished: Path, monkeypatch: pytest.MonkeyPatch, package: str, ask: Callable[[door.Run], object]
) -> None:
    run = door.open("tiny")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(door.UsageError, match=f"pip install {package}"):
        ask(run)
