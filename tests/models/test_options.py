"""model and model_options: how a checkpoint is named and loaded, by the command line."""

import json
import shutil
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.models.families import write_checkpoint

from grpo.artifacts.checkpoint import find_checkpoint, local_checkpoint
from grpo.config import load
from grpo.errors import InputError

ON = ("--set", "generate.engine=transformers")


def tokenizer_into(project: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "model" / name, folder / name)


def test_every_way_to_write_a_path_is_the_same_model(project: Path, grpo: Grpo) -> None:
    assert grpo("run", *ON)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("artifacts").rglob("*.parquet")}
    relative = ["model", "model/", "./model/", "x/../model", "./model/."]
    for way in [*relative, f"{project}/model", f"{project}/./model//"]:
        code, _, err = grpo("run", *ON, "--set", f"model={way}")
        assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in Path("artifacts").rglob("*.parquet")} == before


@pytest.mark.parametrize("way", ["m", "./m", "m/", "a/../m", "./a/.././m/", "{folder}/m"])
def test_paths_are_told_without_detours(tmp_path: Path, way: str) -> None:
    (tmp_path / "a").mkdir()
    for made in (False, True):
        if made:
            (tmp_path / "m").mkdir()
        assert local_checkpoint(way.format(folder=tmp_path), tmp_path) == tmp_path / "m"


def test_a_detour_through_a_link_leads_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "m").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    found = find_checkpoint("link/../m", tmp_path)
    assert found.samefile(tmp_path / "elsewhere" / "m")


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["model=nope"], 4, "model: {project}/nope: no such directory; a Hugging Face checkpoint"),
        (["model=nope"], 4, "or a hub id (owner/name), or `tiny-arithmetic`, the built-in starter model"),
        (["update.reference=./nope/"], 4, "update.reference: {project}/nope: no such directory"),
        (["model_options.revision=v1"], 2, "model_options.revision: v1, but ./model is no hub id"),
        (["model=tiny-arithmetic", "model_options.revision=v1"], 2, "but tiny-arithmetic is no hub id"),
        (["model_options.trust_remote_code=true"], 2, "trust_remote_code stays false: code that comes"),
        (["model_options.load_in_4bit=true"], 2, "load_in_4bit: what is trained is not quantised"),
        (["model_options.quantization_config={}"], 2, "generate.engine_options.quantization; leave it out"),
        (["model_options.torch_dtype=bfloat16"], 2, "torch_dtype: weights are float32; say update.precision"),
        (["model_options.device_map=auto"], 2, "device_map: the device is the machine's"),
        (
            ["model_options.attn_implementation=flash"],
            2,
            "attn_implementation: expected one of auto, sdpa, eager",
        ),
        (["model_options.revison=v1"], 2, "unknown key; did you mean revision?"),
        (["generate.repetition_penalty=1.1"], 2, "repetition_penalty changes the distribution the policy is"),
        (["generate.structured_outputs={regex: a}"], 2, "structured_outputs cuts the distribution"),
        (["generate.structured_outputs={regexp: a}"], 2, "must hold one of regex (text), json (a schema)"),
        (["generate.structured_outputs={regex: a, choice: [b]}"], 2, "must hold one of regex (text)"),
        (["generate.structured_outputs={choice: []}"], 2, "must hold one of regex (text)"),
        (["generate.structured_outputs={choice: [1]}"], 2, "must hold one of regex (text)"),
        (["generate.stop=[x, '']"], 2, "generate.stop[1]: "),
        (["generate.stop=x"], 2, "generate.stop: "),
        (
            ["generate.structured_outputs={regex: a}", "generate.allow_truncated_sampling=true"],
            2,
            "structured_outputs needs engine: vllm",
        ),
    ],
)
def test_refusals(project: Path, grpo: Grpo, settings: list[str], code: int, message: str) -> None:
    sets = [part for each in settings for part in ("--set", each)]
    found, _, err = grpo("run", *ON, *sets)
    assert found == code, err
    assert message.format(project=project) in err
    assert err.count("\n") == 1


def test_a_revision_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked[name] = options["revision"]
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=r"org/m at revision v2: no directory .* from the hub: offline"):
        find_checkpoint("org/m", tmp_path, "v2")
    assert asked == {"org/m": "v2"}


def test_new_keys_at_their_defaults_are_in_no_fingerprint(project: Path) -> None:
    config = load(Path("pipeline.yaml"))
    added = {"stop", "repetition_penalty", "structured_outputs"}
    assert added & config.generate.recorded().keys() == set()
    assert "model_options" not in config.recorded()
    assert config.loaded_with() == {}
    used = load(Path("pipeline.yaml"), ["generate.stop=[x]", "model_options.attn_implementation=eager"])
    assert used.generate.recorded()["stop"] == ["x"]
    assert used.loaded_with() == {"model_options": {"attn_implementation": "eager"}}


def test_stop_texts_end_rollouts_and_evaluations(project: Path, grpo: Grpo) -> None:
    (project / "held_out.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    letters = [*"aeinorst", " "]
    sets = [
        f"generate.stop={letters}",
        "generate.max_new_tokens=24",
        "generate.samples_per_prompt=8",
        "evaluate={prompts: {source: held_out.jsonl}, every: 1, samples_per_prompt: 16}",
    ]
    code, _, err = grpo("run", *ON, *(part for each in sets for part in ("--set", each)))
    assert code == 0, err
    for table in ("rollouts", "eval_rollouts"):
        query = f"select response, finish_reason, response_tokens from {table}"
        rows = [tuple(row.values()) for row in json.loads(grpo("sql", "--json", query)[1])]
        assert rows, table
        ended = [row for row in rows if any(letter in row[0] for letter in letters)]
        assert ended, table
        for response, reason, _ in ended:
            assert reason == "stop"
            assert response[-1] in letters
            assert not any(letter in response[:-1] for letter in letters)
        for response, reason, tokens in rows:
            assert reason == "stop" or tokens == 24, response


# Kind 4: what engine and learner share


def test_doctor_compares_with_transformers_and_not_with_itself(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(project / "capped", "gemma2", {"vocab_size": 258})
    tokenizer_into(project, project / "capped")
    code, out, _ = grpo("doctor", "--model", *ON, "--set", "model=./capped")
    assert code == 0, out
    # The fault that was: sdpa drops the softcap, in learner and engine alike.
    monkeypatch.setattr("grpo.models.attention.sdpa_drops", lambda model: "")
    code, out, _ = grpo("doctor", "--model", *ON, "--set", "model=./capped")
    assert code == 8
    said = " ".join(out.split())
    assert "failed plain transformers: the learner is" in said
    assert "from plain transformers in eager attention, at most 0.0001 is right in float32" in said
    assert "failed agreement" not in said
