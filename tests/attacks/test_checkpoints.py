"""Checkpoints that somebody sent: broken, hostile, or of a kind that is not trained here. One line each.

Each is loaded in a child process whose memory is limited: what a configuration of a few numbers asks for is
compared with the headers of its weights before anything is allocated.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Grpo
from tests.models.families import write_checkpoint
from transformers import Qwen3Config

from grpo.errors import CorruptError, GrpoError, InputError, UnsupportedModelError
from grpo.generate.engines.kv_cache import new_cache
from grpo.models.loading import eos_token_ids, load_config, load_model, load_tokenizer
from grpo.models.tokenizer import tokenizer_at
from grpo.score.reward_model import RewardModel

DEEP = "[" * 200_000
WIDTH = 32
LIMIT = 6 * 2**30  # bytes of address space; torch alone maps 3 GiB


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def weight(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})

    return apply


def header(length: int) -> Callable[[Path], None]:
    """The length of a header, as the first eight bytes of a safetensors file say it."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return apply


def index(content: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return apply


# What is done to a checkpoint of Qwen3 -> the exit code and a part of the line.
ATTACKS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "a million layers": (
        config(num_hidden_layers=10**6, layer_types=None),
        6,
        "num_hidden_layers is 1000000",
    ),
    "10**12 layers": (config(num_hidden_layers=10**12, layer_types=None), 6, "at most 4096"),
    "more layers than weights": (config(num_hidden_layers=4000, layer_types=None), 6, "far more"),
    "a vocabulary of 3": (config(vocab_size=3), 6, "config.json asks for"),
    "a vocabulary of 3, a pad token beyond": (config(vocab_size=3, pad_token_id=60), 4, ""),
    "a vocabulary of 10**9": (config(vocab_size=10**9), 6, "far more weights"),
    "a vocabulary of 10**18": (config(vocab_size=10**18), 6, ""),
    "a width of 10**7": (config(hidden_size=10**7), 6, "far more weights"),
    "heads of 10**8": (config(head_dim=10**8), 6, "far more weights"),
    "10**9 heads": (config(num_attention_heads=10**9), 6, "far more weights"),
    "a width that is a word": (config(hidden_size="x"), 4, "hidden_size"),
    "a width of -5": (config(hidden_size=-5), 6, ""),
    "no heads": (config(num_attention_heads=0), 4, ""),
    "other heads": (config(num_attention_heads=8, head_dim=4, num_key_value_heads=3), 6, ""),
    "an unknown activation": (config(hidden_act="x"), 4, ""),
    "a rope that is none": (config(rope_parameters={"rope_type": "x", "rope_theta": 1.0}), 4, ""),
    "a rope that is a list": (config(rope_parameters=[1]), 4, ""),
    "a model that is a list": (config(model_type=["x"]), 4, ""),
    "layers of unknown kinds": (config(layer_types=["x", "y"]), 4, "layer_types"),
    "a list": (text("config.json", "[]"), 6, "expected a JSON object"),
    "deep JSON": (text("config.json", DEEP), 6, "is not JSON"),
    "deep JSON in a key": (text("config.json", '{"a": ' + DEEP), 6, "is not JSON"),
    "another shape": (weight("model.norm.weight", torch.zeros(5)), 6, "has shape [5]"),
    "no weights but an index": (index({"weight_map": {"a": "gone.safetensors"}}), 4, "gone.safetensors"),
    "an index of numbers": (index({"weight_map": {"a": 5}}), 4, ""),
    "an index of other folders": (index({"weight_map": {"a": "../x.safetensors"}}), 6, "of another folder"),
    "an index that is a list": (index([]), 6, "expected a JSON object"),
    "10**9 labels": (config(num_labels=10**9), 6, "num_labels is 1000000000; at most 65536"),
    "a width of 81 bits": (config(hidden_size=2**80), 6, "hidden_size has 81 bits"),
    "a large configuration": (
        config(id2label=dict.fromkeys(map(str, range(400_000)), "x")),
        6,
        "at most 4 can",
    ),
    "a large index": (text("model.safetensors.index.json", " " * (65 * 2**20)), 6, "has 65 MiB; at most 64"),
    **{
        f"{kind} weights": (weight("model.norm.weight", torch.ones(WIDTH, dtype=kind)), 6, "real numbers")
        for kind in (torch.complex64, torch.int8, torch.int64, torch.bool)
    },
    **{
        f"a weight of {value}": (
            weight("model.norm.weight", torch.full((WIDTH,), value)),
            6,
            "NaN or infinity",
        )
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    "float64 beyond float32": (
        weight("model.norm.weight", torch.full((WIDTH,), 1e300, dtype=torch.float64)),
        6,
        "NaN or infinity",
    ),
    **{
        f"a header of {length} bytes": (header(length), 6, "weights cannot be read")
        for length in (0, 2**60, 2**64 - 1)
    },
    "weights of another kind": (text("model.safetensors", "x" * 99), 6, "its weights cannot be read"),
    "code of its own": (
        config(model_type="mine", auto_map={"AutoConfig": "a.B"}),
        4,
        "model_options.trust_remote_code",
    ),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), 4, "is quantised (fp8)"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "model", "qwen3")


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


CHILD = """
import resource, sys, time
from pathlib import Path
from grpo.errors import GrpoError
from grpo.models.loading import load_model, load_skeleton
resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
for line in sys.stdin:
    started = time.monotonic()
    try:
        load_model(Path(line.strip()), "cpu")
        code, said = 0, ""
    except GrpoError as error:
        code, said = error.exit_code, str(error)
    print(code, f"{time.monotonic() - started:.1f}", said.replace("\\n", "<newline>"), flush=True)
"""


def test_every_attack_on_a_checkpoint_is_one_line(sound: Path, tmp_path: Path) -> None:
    """One process for all: it survives each of them, in memory that is bounded and little time."""
    folders = {}
    for number, (name, (attack, _, _)) in enumerate(ATTACKS.items()):
        folders[name] = Path(shutil.copytree(sound, tmp_path / f"{number}"))
        attack(folders[name])
    lines = "".join(f"{folder}\n" for folder in [*folders.values(), sound])
    code = CHILD.replace("LIMIT, LIMIT", f"{LIMIT}, {LIMIT}")
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True)
    *answers, last = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(answers) == len(ATTACKS), done.stderr[-2000:]
    for (name, (_, expected, part)), (found, seconds, said) in zip(ATTACKS.items(), answers, strict=True):
        assert (name, int(found)) == (name, expected), said
        assert part in said, name
        assert not any(word in said for word in ("<newline>", "equest", "Traceback")), said
        assert float(seconds) < 20, name
        assert str(folders[name]) in said, said
    assert last[0] == "0"  # a sound one after all of them


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [DEEP, "[]", "{}", '{"version": 5}', "", "\0"])
def test_a_broken_tokenizer_is_one_line(checkpoint: Path, name: str, content: str) -> None:
    if name != "tokenizer.json":
        (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / name).write_text(content)
    with pytest.raises(GrpoError) as caught:
        load_tokenizer(checkpoint)
    assert isinstance(caught.value, InputError | CorruptError)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", ["x", [["y"]], {"a": 1}, -1, 2**40, True, 1.5, [None]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_of_sequence_that_is_no_token_is_one_line(checkpoint: Path, name: str, ids: Any) -> None:
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / name).write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CorruptError, match=f"{name}: eos_token_id is .*; token ids are right"):
        eos_token_ids(checkpoint)


def test_parts_that_are_no_parts(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps({"text_config": ["x"]}))
    assert eos_token_ids(checkpoint) == frozenset()
    with pytest.raises(GrpoError):
        load_config(checkpoint)


def test_attention_with_sinks_is_refused_and_eager_is_named(tmp_path: Path) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}
    folder = write_checkpoint(tmp_path / "gpt_oss", "gpt_oss", changes)
    with pytest.raises(InputError) as caught:
        load_model(folder, "cpu")
    said = str(caught.value)
    assert (
        "the attention of gpt_oss is none that sdpa computes; set model_options.attn_implementation" in said
    )
    assert "or take a model of a family that is tested: apertus, " in said
    assert not any(word in said for word in ("equest", "github", "\n"))
    assert load_model(folder, "cpu", "eager").config._attn_implementation == "eager"


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bert", "bert", {"is_decoder": False})
    with pytest.raises(InputError, match="cannot be loaded as a causal language model: its tokens see later"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (config(vocab_size=10**9), 6),
        (config(num_hidden_layers=10**6, layer_types=None), 6),
        (config(hidden_size="x"), 4),
    ],
)
def test_a_hostile_reward_model_is_one_line(
    checkpoint: Path, attack: Callable[[Path], None], code: int
) -> None:
    config(num_labels=1)(checkpoint)
    attack(checkpoint)
    with pytest.raises(GrpoError) as caught:
        RewardModel(checkpoint, "cpu")
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_doctor_finds_them_without_loading_the_model(project: Path, grpo: Grpo) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "vocab_size": 258}
    write_checkpoint(project / "sinks", "gpt_oss", changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "model" / name, project / "sinks" / name)
    code, out, _ = grpo("doctor", "--set", "model=./sinks")
    assert code == 4
    assert "the attention of gpt_oss is none that sdpa computes" in " ".join(out.split())
    config(num_hidden_layers=10**6)(project / "sinks")
    code, out, _ = grpo("doctor", "--set", "model=./sinks")
    assert code == 6
    assert "Traceback" not in out


def test_a_state_that_cannot_be_batched_is_found_by_doctor_and_run(project: Path, grpo: Grpo) -> None:
    changes = {"layer_types": ["conv", "full_attention"], "vocab_size": 258}
    write_checkpoint(project / "hybrid", "lfm2", changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "model" / name, project / "hybrid" / name)
    for command in ("doctor", "run"):
        code, out, err = grpo(command, "--set", "model=./hybrid", "--set", "generate.engine=transformers")
        assert (command, code) == (command, 4)
        said = " ".join((out + err).split())
        assert "generate: lfm2 keeps a" in said
        assert "which cannot be batched here; use engine: vllm" in said
        assert "Traceback" not in said


# A part of tokenizer.json -> what it says of it. Each would fill the memory at the first text.
GROWING: dict[str, dict[str, Any]] = {
    "normalizer": {"type": "Replace", "pattern": {"String": "1"}, "content": "1" * 10**6},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    "decoder": {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "1"}, "content": "1" * 100}] * 2,
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 10**4
        + [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"x": {"id": "x", "ids": [5], "tokens": ["x"]}},
    },
}


@pytest.mark.parametrize("part", GROWING)
def test_a_tokenizer_that_writes_far_more_than_it_reads(project: Path, grpo: Grpo, part: str) -> None:
    path = project / "model/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: GROWING[part]}))
    if part == "pre_tokenizer":  # that of many models, which is sound
        load_tokenizer(project / "model")
        return
    code, _, err = grpo("run", "--set", "run=growing")
    assert (code, err.count("\n")) == (6, 1), err
    assert f"its {part} may make a text" in err
    with pytest.raises(CorruptError, match="may make a text"):
        tokenizer_at(project / "model")


@pytest.mark.parametrize("times", [1, 10])
def test_parts_behind_each_other_multiply(checkpoint: Path, project: Path, times: int) -> None:
    path = project / "model/tokenizer.json"
    step = {"type": "Replace", "pattern": {"String": "="}, "content": "=="}
    part = {"type": "Sequence", "normalizers": [step] * times}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": part}))
    if times == 1:
        assert tokenizer_at(project / "model").encode("=").ids
    else:
        with pytest.raises(CorruptError, match="1,024 times"):
            tokenizer_at(project / "model")


def test_a_tokenizer_whose_tokens_the_model_does_not_know(project: Path, grpo: Grpo) -> None:
    path = project / "model/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {text: number + 5000 for text, number in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    code, _, err = grpo("run", "--set", "run=beyond")
    assert code == 6
    assert "its tokenizer gives token 5" in err
    assert "its model knows those below" in err


@pytest.mark.parametrize("content", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_hundreds_of_megabytes_is_not_read(checkpoint: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    with (checkpoint / content).open("wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(CorruptError, match=f"{content}: has 300 MiB; at most"):
        load_tokenizer(checkpoint)


def test_a_tokenizer_that_fails_with_every_text(project: Path) -> None:
    path = project / "model/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(project / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_model_with_weights_that_are_no_numbers(checkpoint: Path, value: float) -> None:
    config(num_labels=1)(checkpoint)
    weight("score.weight", torch.full((1, WIDTH), value))(checkpoint)
    with pytest.raises(CorruptError, match=r"score\.weight holds NaN or infinity"):
        RewardModel(checkpoint, "cpu")


@pytest.mark.parametrize("window", [0, -5])
def test_a_window_that_sees_nothing(window: int) -> None:
    kinds: Any = {"use_sliding_window": True, "layer_types": ["sliding_attention"], "num_hidden_layers": 1}
    with pytest.raises(UnsupportedModelError, match="sliding_window must be at least 1"):
        new_cache(Qwen3Config(sliding_window=window, **kinds), 1)
