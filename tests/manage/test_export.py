"""An exported policy is what the run has: loaded by the libraries themselves, and by another run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.conftest import Grpo
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo.artifacts import ARTIFACTS, ActiveRun
from grpo.config import Config, load
from grpo.console import Console
from grpo.manage.export import export
from grpo.manage.export.card import card_of
from grpo.models.loading import load_model

IDS = torch.tensor([[49, 43, 49, 61, 256, 7]])
RUN = ARTIFACTS / "tiny"
CHECKPOINT = RUN / "iteration=000001" / "checkpoint"
auto: Any = AutoModelForCausalLM


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def opened(*settings: str) -> ActiveRun:
    return ActiveRun(ARTIFACTS, load(Path("pipeline.yaml"), list(settings)), Path.cwd(), Console(quiet=True))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what is written ----


def test_the_newest_policy_loads_and_computes_the_same_bits(finished: Path, grpo: Grpo) -> None:
    code, out, err = grpo("export", "--out", "out/mine", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["run"], told["policy"], told["folder"]) == ("tiny", 2, "out/mine")
    folder = finished / "out" / "mine"
    assert told["files"] == sorted(files_in(folder))
    assert files_in(folder) == {*files_in(finished / "model"), "README.md"}
    assert files_in(finished / "out") == {"mine"}  # nothing unfinished beside it
    model = auto.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(load_model(CHECKPOINT / "policy", "cpu")))
    assert not torch.equal(logits(model), logits(load_model(finished / "model", "cpu")))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "1+1="}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: 1+1=\n"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 256


def test_what_is_done_to_the_exported_files_is_not_done_to_the_run(finished: Path, grpo: Grpo) -> None:
    assert grpo("export", "--out", "mine")[0] == 0
    with (finished / "mine" / "model.safetensors").open("r+b") as file:  # as save_pretrained writes: in place
        file.write(b"\0" * 100)
    assert grpo("verify")[0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cast_weights_are_what_transformers_casts_to(finished: Path, grpo: Grpo, dtype: str) -> None:
    assert grpo("export", "--out", "mine", "--policy", "1", "--dtype", dtype)[0] == 0
    model = auto.from_pretrained("mine")  # the dtype that config.json names
    assert str(model.dtype) == f"torch.{dtype}"
    policy = RUN / "iteration=000000" / "checkpoint" / "policy"
    expected = auto.from_pretrained(policy, dtype=getattr(torch, dtype))
    assert torch.equal(logits(model), logits(expected))


def test_weights_in_several_files_come_in_and_go_out(project: Path, grpo: Grpo) -> None:
    single = load_model(project / "model", "cpu")
    shutil.copytree(project / "model", "sharded")
    Path("sharded/model.safetensors").unlink()
    auto.from_pretrained("model").save_pretrained("sharded", max_shard_size="8KB")
    shards = {name for name in files_in(project / "sharded") if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert torch.equal(logits(load_model(project / "sharded", "cpu")), logits(single))
    code, _, err = grpo("run", "--until", "1", "--set", "model=./sharded")
    assert code == 0, err
    assert (
        grpo("export", "tiny", "--policy", "0", "--out", "plain", "--set", "model=./sharded")[0] == 2
    )  # no --set
    export(opened("model=./sharded"), 0, Path("cast"), "bfloat16", False)
    assert files_in(project / "cast") == {*files_in(project / "sharded"), "README.md"}
    expected = auto.from_pretrained("model", dtype=torch.bfloat16)
    assert torch.equal(logits(auto.from_pretrained("cast")), logits(expected))
    index = json.loads((project / "cast" / "model.safetensors.index.json").read_text())
    parameters = sum(p.numel() for p in expected.parameters())
    assert index["metadata"]["total_size"] == 2 * parameters


def test_an_adapter_loads_in_peft_and_makes_the_merged_policy(project: Path, grpo: Grpo) -> None:
    peft = pytest.importorskip("peft")
    settings = ["--set", "update.lora={rank: 4, alpha: 8.0}", "--set", "update.learning_rate=0.1"]
    assert grpo("run", "--until", "1", *settings)[0] == 0
    assert grpo("export", "--out", "adapter", "--adapter")[0] == 0
    assert grpo("export", "--out", "merged")[0] == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files_in(project / "adapter")
    assert "model.safetensors" not in files_in(project / "adapter")
    adapted = peft.PeftModel.from_pretrained(auto.from_pretrained("model"), "adapter")
    merged, start = logits(auto.from_pretrained("merged")), logits(auto.from_pretrained("model"))
    assert torch.allclose(logits(adapted), merged, atol=1e-5)
    assert not torch.allclose(start, merged, atol=1e-3)
    card = ModelCard.load(project / "adapter" / "README.md")
    assert (card.data.library_name, "lora" in card.data.tags) == ("peft", True)


def test_an_exported_policy_starts_another_run(finished: Path, grpo: Grpo) -> None:
    assert grpo("export", "--out", "mine")[0] == 0
    code, _, err = grpo("run", "--until", "1", "--set", "run=second", "--set", "model=./mine")
    assert code == 0, err
    first, second = (
        json.loads((ARTIFACTS / run / "policy" / "weight_check.json").read_text())
        for run in ("tiny", "second")
    )
    assert first["sequences"] == second["sequences"]
    last = json.loads((RUN / "iteration=000001" / "update" / "weight_check.json").read_text())
    assert second["logprobs"] == last["logprobs"]  # it computes what the other run's last policy did


def test_a_chat_template_of_the_run_goes_with_the_policy(project: Path, grpo: Grpo) -> None:
    Path("my.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    settings = ["--set", "prompts.chat=true", "--set", "prompts.chat_template=my.jinja"]
    code, _, err = grpo("run", "--until", "1", *settings, "--set", "score.rewards=[{function: exact_answer}]")
    assert code == 0, err
    assert json.loads(grpo("sql", "--json", "select min(prompt) as p from rollouts")[1])[0]["p"].startswith(
        "["
    )
    export(opened(*settings[1::2]), None, Path("mine"), None, False)
    tokenizer: Any = AutoTokenizer.from_pretrained("mine")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


# ---- what is not on disk ----

FORMS = {
    "full": ([], []),
    "merged": (["update.lora={rank: 2, alpha: 4.0}"], []),
    "adapter": (["update.lora={rank: 2, alpha: 4.0}"], ["--adapter"]),
}


def weights_in(folder: Path) -> bytes:
    [path] = folder.glob("*.safetensors")
    return path.read_bytes()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below one, with its size and when it was written."""
    found = {path: path.stat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}


@pytest.mark.parametrize(("settings", "options"), FORMS.values(), ids=FORMS)
def test_a_policy_that_is_not_on_disk_is_exported_with_the_same_bytes(
    project: Path, grpo: Grpo, settings: list[str], options: list[str]
) -> None:
    """And nothing is written into the run."""
    sets = [part for setting in [*settings, "iterations=3"] for part in ("--set", setting)]
    assert grpo("run", *sets, "--set", "checkpoints={every: 1, keep_last: null}")[0] == 0
    assert grpo("export", "--policy", "2", "--out", "kept", *options)[0] == 0
    shutil.rmtree(RUN)
    assert grpo("run", *sets, "--set", "checkpoints={every: 9}")[0] == 0
    assert [path.parent.name for path in RUN.glob("*/checkpoint")] == ["iteration=000002"]  # the last
    before = listing(RUN)
    code, _, err = grpo("export", "--policy", "2", "--out", "rebuilt", *options)
    assert code == 0, err
    assert "policy 2 is not on disk: rebuilding it from policy 0 (2 updates, about" in err
    assert listing(RUN) == before
    assert weights_in(Path("rebuilt")) == weights_in(Path("kept"))
    assert files_in(project / "rebuilt") == files_in(project / "kept")
    assert not list(project.glob(".*"))  # nothing unfinished beside it


# ---- the model card ----


def test_the_card_says_what_the_policy_is_made_of(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", "--set", "iterations=3", "--set", "update.learning_rate=0.001")[0] == 0
    assert grpo("export", "--out", "mine")[0] == 0
    card = ModelCard.load(finished / "mine" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "grpo-stages", "reinforcement-learning"],
    }
    text = card.text
    assert "# tiny, policy 3" in text
    assert "`model` after 3 iterations of GRPO, objective `grpo`; weights in float32." in text
    assert "| `code` | `reward:code` | 1 |" in text
    assert "- Prompts: `prompts.jsonl`\n" in text
    status = json.loads(grpo("status", "--json")[1])["iterations"]
    for row in status:
        assert f"| {row['iteration']} | {row['reward']:.4g} | {row['kl']:.4g} |" in text
    assert "\n- torch: " in text
    block = text.partition("```yaml\n")[2].partition("```")[0]
    Path("again.yaml").write_text(block)
    assert load(Path("again.yaml")) == load(Path("pipeline.yaml"))  # exact: the file of another run
    assert "- from iteration 2: `update.learning_rate: 0.01 -> 0.001`" in text


def test_an_evaluation_of_which_nothing_was_scored_is_no_line_of_the_card(
    measured_project: Path, grpo: Grpo
) -> None:
    """The reward applies to prompts of training, `n+1=`, and to no held-out one, `n+2=`."""
    Path("reward.py").write_text(
        "def code(prompts, completions, **columns):\n"
        "    return [None if '+2' in p else float(len(c)) for p, c in zip(prompts, completions)]\n"
    )
    assert grpo("run", "--until", "1")[0] == 0
    assert grpo("export", "--out", "out")[0] == 0
    card = Path("out/README.md").read_text()
    assert "after 1 iteration of GRPO" in card
    assert "held-out prompts, with" not in card


def test_the_card_links_what_is_on_the_hub_and_holds_any_text(tmp_path: Path, finished: Path) -> None:
    run = opened()
    path = ARTIFACTS / "tiny" / "run.json"
    from grpo.artifacts import seal

    config = run.config.model_dump()
    config |= {
        "model": "owner/base",
        "prompts": {**config["prompts"], "source": "owner/data", "system": "```\n|x|"},
    }
    path.write_bytes(seal({"config": Config.model_validate(config).model_dump(), "versions": {}}))
    Path("card.md").write_text(card_of(run, 2, "bfloat16", False))
    card = ModelCard.load("card.md")
    assert (card.data.base_model, card.data.datasets) == ("owner/base", ["owner/data"])
    assert "[owner/base](https://huggingface.co/owner/base) after 2 iterations" in card.text
    assert "- Prompts: `owner/data` (split train)\n" in card.text
    assert "\n````yaml\n" in card.text  # longer than any fence within


# ---- what is refused ----


@pytest.mark.parametrize("gone", [False, True])
def test_the_start_is_needed_where_a_policy_is_rebuilt(finished: Path, grpo: Grpo, gone: bool) -> None:
    if gone:
        shutil.rmtree("model")
        line = "model: {finished}/model: no such directory; a Hugging Face checkpoint directory is needed"
    else:
        shutil.copy(RUN / "iteration=000001/checkpoint/policy/model.safetensors", "model/model.safetensors")
        line = "fixed for the run tiny"
    assert grpo("export", "--policy", "1", "--out", "there")[0] == 0  # the run has all of it
    shutil.rmtree(RUN / "iteration=000000/checkpoint")
    code, _, err = grpo("export", "--policy", "1", "--out", "mine")
    assert (code, len(err.splitlines()), line.format(finished=finished) in err) == (4, 1, True), err
    assert not list(finished.glob("*mine*"))


def test_a_policy_that_is_gone_is_not_exported(finished: Path, grpo: Grpo) -> None:
    shutil.rmtree(RUN / "iteration=000000/checkpoint")
    force = ["--iteration", "0", "--force", "--set", "advantage.scale=none"]
    assert grpo("advantage", *force)[0] == 0
    code, _, err = grpo("export", "--policy", "1", "--out", "mine")
    assert (code, err.strip()) == (
        4,
        "error: policy 1 is not on disk, and cannot be rebuilt: update 0 was made from another advantages@0"
        " than the one that is there; `grpo run --from 0` makes another",
    )
    assert grpo("export", "--policy", "2", "--out", "last")[0] == 0


@pytest.mark.parametrize(
    ("spoil", "options", "code", "message"),
    [
        (lambda: None, (), 2, "Missing option '--out'; see `grpo export --help`"),
        (lambda: None, ("--out", "x", "--policy", "9"), 2, "--policy 9: run tiny has policies 0 to 2"),
        (
            lambda: None,
            ("--out", "x", "--dtype", "int8"),
            2,
            "--dtype int8: expected float32, bfloat16, float16",
        ),
        (lambda: None, ("--out", "x", "--adapter"), 2, "--adapter: policy 2 of run tiny has none"),
        (lambda: None, ("--out", "x", "--push", "me"), 2, "--push me: expected owner/name"),
        (lambda: None, ("--out", "x", "--push", "a/b/c"), 2, "--push a/b/c: Repo id must be"),
        (lambda: None, ("--out", "model"), 2, "model: is there already and not empty; name another folder"),
        (lambda: None, ("--out", "reward.py"), 2, "reward.py: is there already and not empty"),
        (
            lambda: (CHECKPOINT / "policy" / "model.safetensors").write_bytes(b"x"),
            ("--out", "x"),
            6,
            "policy/model.safetensors: 1 bytes, but its manifest says",
        ),
        (
            lambda: Path("model/config.json").write_text("{}"),
            ("--out", "x", "--policy", "0"),
            4,
            "model: not the checkpoint that run tiny started from; put that one back",
        ),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(
    finished: Path, grpo: Grpo, spoil: Callable[[], object], options: tuple[str, ...], code: int, message: str
) -> None:
    spoil()
    before = files_in(finished)
    found, out, err = grpo("export", *options)
    assert (found, out) == (code, ""), err
    assert message in err
    assert files_in(finished) == before


def test_an_empty_folder_is_taken(finished: Path, grpo: Grpo) -> None:
    Path("mine").mkdir()
    assert grpo("export", "--out", "mine")[0] == 0
    assert "model.safetensors" in files_in(finished / "mine")


def test_a_number_too_large_for_float16_is_said(finished: Path, grpo: Grpo) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    code, _, err = grpo("run", "--until", "1", "--set", "run=large")
    assert code == 0, err
    code, _, err = grpo("export", "large", "--policy", "0", "--out", "x", "--dtype", "float16")
    assert (code, "--dtype float16: model.norm.weight is too large for it; take bfloat16" in err) == (
        2,
        True,
    ), err
